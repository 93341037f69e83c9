# SPDX-License-Identifier: MIT
# distutils: extra_compile_args = -fopenmp -ffp-contract=off -fno-math-errno
# distutils: extra_link_args = -fopenmp
# distutils: libraries = m
"""Steps many parameters, tile by tile (`_tiles.h`), on as many threads as torch would take."""

from libc.math cimport isinf
from libc.stddef cimport size_t
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free

cdef extern from "updater/_tiles.h" nogil:
    ctypedef void (*fc_root)(int, const float *, float *, long)
    ctypedef int (*fc_threads)(int)
    ctypedef struct fc_step:
        float *parameter
        const float *gradient
        float *first
        float *second
        size_t count
        int scaled, negated, begins, nesterov
        float scale, coupled, size, decay, weight, kept, added, correction, epsilon, momentum, damped
        fc_root root
    ctypedef void (*fc_stepper)(const fc_step *, size_t, size_t)
    fc_stepper fc_stepper_of(int vectors)
    void fc_steps(const fc_step *steps, size_t count, fc_stepper tiles, int threads, fc_threads mkl_threads)

#: Bits of the vectors that steps can be done with here, the fastest first; 0: as the compiler would have it.
VECTORS = [vectors for vectors in (512, 256, 0) if fc_stepper_of(vectors) != NULL]


cdef float _float(value) except? -1:
    """torch refuses what float32 has not got."""
    cdef float found = value
    if isinf(found):
        raise OverflowError(f"{value} is no float32")
    return found


def step(list rows, uintptr_t root, uintptr_t mkl_threads, int threads, int vectors=VECTORS[0]) -> None:
    """step(rows, root, mkl_threads, threads, vectors): step every row's parameter; OverflowError, and nothing was stepped, if a number is no float32.

    A row is a dictionary: addresses of contiguous float32 memory (`parameter`, `gradient`, `first`, `second`; 0: none), their `count`
    of elements, and numbers by the names of `fc_step`. `root` is the address of MKL's vmsSqrt, 0: roots are IEEE's;
    `mkl_threads` that of its MKL_Set_Num_Threads_Local, 0: there is none.
    """
    cdef size_t count = len(rows), n
    cdef fc_stepper tiles = fc_stepper_of(vectors)
    cdef fc_step *steps = NULL
    cdef fc_step *s
    if tiles == NULL:
        raise ValueError(f"no vectors of {vectors} bits here")
    steps = <fc_step *> calloc(count or 1, sizeof(fc_step))
    if steps == NULL:
        raise MemoryError()
    try:
        for n in range(count):
            row, s = rows[n], &steps[n]
            s.parameter = <float *> <uintptr_t> row["parameter"]
            s.gradient = <const float *> <uintptr_t> row["gradient"]
            s.first = <float *> <uintptr_t> row["first"]
            s.second = <float *> <uintptr_t> row["second"]
            s.count = row["count"]
            s.root = <fc_root> root
            s.scaled = row["scale"] is not None
            s.scale = _float(row["scale"]) if s.scaled else 1
            s.negated, s.coupled, s.size = row["negated"], _float(row["coupled"]), _float(row["size"])
            if s.second != NULL:
                s.decay, s.weight = _float(row["decay"]), _float(row["weight"])
                s.kept, s.added = _float(row["kept"]), _float(row["added"])
                s.correction, s.epsilon = _float(row["correction"]), _float(row["epsilon"])
            elif s.first != NULL:
                s.begins, s.nesterov = row["begins"], row["nesterov"]
                s.momentum, s.damped = _float(row["momentum"]), _float(row["damped"])
        with nogil:
            fc_steps(steps, count, tiles, threads, <fc_threads> mkl_threads)
    finally:
        free(steps)
