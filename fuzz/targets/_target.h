/* SPDX-License-Identifier: MIT
 *
 * What a fuzz target of compiled code is made of: Python embedded once, memory whose unused bytes nobody may touch, and a
 * claim that ends the process where it does not hold. FUZZ_MODULE is the name of the target's Cython module, FUZZ_PYTHON
 * the interpreter whose packages it sees.
 */
#ifndef FLOWCHECK_FUZZ_TARGET_H
#define FLOWCHECK_FUZZ_TARGET_H

#include <Python.h>
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>

#define FUZZ_TEXT_(x) #x
#define FUZZ_TEXT(x) FUZZ_TEXT_(x)
#define FUZZ_INIT_(x) PyInit_##x
#define FUZZ_INIT(x) FUZZ_INIT_(x)

/* What must hold of the code under test, and a number to look at where it does not. */
static inline void fuzz_claim(int holds, const char *what, long long number) {
    if (!holds) {
        fprintf(stderr, "does not hold: %s (%lld)\n", what, number);
        abort();
    }
}

/* Nobody may touch these bytes, or may again; the sanitizer reports who does. */
static inline void fuzz_forbid(const void *begin, size_t bytes) { ASAN_POISON_MEMORY_REGION(begin, bytes); }
static inline void fuzz_allow(const void *begin, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(begin, bytes); }

enum { FUZZ_ROOMS = 3, FUZZ_ROOM_BYTES = 1 << 16, FUZZ_ROOM_EDGE = 1 << 10 };

/* Memory of exactly so many bytes, up to 63 KiB, in one of the rooms; what was there is lost. Nobody may touch what lies
 * around it. Much faster than to allocate it, which puts as much in front of the sanitizer. */
static inline uint8_t *fuzz_exactly(uint32_t room, size_t bytes) {
    static uint8_t rooms[FUZZ_ROOMS][FUZZ_ROOM_BYTES] __attribute__((aligned(64)));
    static size_t allowed[FUZZ_ROOMS];
    static int fenced;
    uint8_t *begin = rooms[room] + FUZZ_ROOM_EDGE;
    if (!fenced) fuzz_forbid(rooms, sizeof(rooms)), fenced = 1;
    if (bytes > FUZZ_ROOM_BYTES - FUZZ_ROOM_EDGE) abort();
    if (bytes > allowed[room]) fuzz_allow(begin, bytes);
    if (bytes < allowed[room]) fuzz_forbid(begin + bytes, allowed[room] - bytes);
    allowed[room] = bytes;
    return begin;
}

PyMODINIT_FUNC FUZZ_INIT(FUZZ_MODULE)(void);

static void fuzz_give_up(const char *what) {
    if (PyErr_Occurred()) PyErr_Print();
    fprintf(stderr, "fuzz target: %s\n", what);
    exit(70);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    PyConfig config;
    (void)argc, (void)argv;
    if (PyImport_AppendInittab(FUZZ_TEXT(FUZZ_MODULE), FUZZ_INIT(FUZZ_MODULE)) < 0) fuzz_give_up("no memory");
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0; /* the fuzzer's own stay */
    if (PyStatus_Exception(PyConfig_SetBytesString(&config, &config.program_name, FUZZ_PYTHON)) ||
        PyStatus_Exception(Py_InitializeFromConfig(&config)))
        fuzz_give_up("Python does not start");
    PyConfig_Clear(&config);
    if (PyImport_ImportModule(FUZZ_TEXT(FUZZ_MODULE)) == NULL) fuzz_give_up("the target cannot be made");
    return 0;
}

#endif
