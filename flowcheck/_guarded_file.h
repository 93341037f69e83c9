/* SPDX-License-Identifier: MIT
 *
 * Mapped memory whose file somebody may cut: where the kernel would end the process (SIGBUS), what is gone reads as zeros
 * from then on, and a mark says so.
 */
#ifndef FLOWCHECK_GUARDED_FILE_H
#define FLOWCHECK_GUARDED_FILE_H

#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { FC_AREAS = 256, FC_AREA_PAGE = 4096 };

struct fc_area {
    uint8_t *begin; /* on a page; NULL: free */
    uint64_t size;
    volatile sig_atomic_t cut;
};

static struct fc_area fc_areas[FC_AREAS];
static struct sigaction fc_before_areas;

static void fc_area_fault(int number, siginfo_t *info, void *context) {
    uint8_t *at = (uint8_t *)info->si_addr;
    (void)context;
    for (int i = 0; info->si_code > 0 && i < FC_AREAS; i++) {
        struct fc_area *area = &fc_areas[i];
        if (area->begin && at >= area->begin && at < area->begin + area->size) {
            uint8_t *page = (uint8_t *)((uintptr_t)at & ~(uintptr_t)(FC_AREA_PAGE - 1));
            if (mmap(page, area->begin + area->size - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
                break;
            area->cut = 1;
            return;
        }
    }
    sigaction(number, &fc_before_areas, 0); /* not ours: it comes again, to whoever had it before */
    if (info->si_code <= 0)
        raise(number);
}

/* Guard an area until fc_area_leave; NULL if there are too many. Not for two threads at once. */
static inline struct fc_area *fc_area_guard(uint8_t *begin, uint64_t size) {
    struct sigaction now, ours;
    for (int i = 0; i < FC_AREAS; i++) {
        if (fc_areas[i].begin)
            continue;
        memset(&ours, 0, sizeof(ours));
        ours.sa_sigaction = fc_area_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        if (sigaction(SIGBUS, 0, &now) < 0)
            return 0;
        if (now.sa_sigaction != fc_area_fault) {
            fc_before_areas = now;
            if (sigaction(SIGBUS, &ours, 0) < 0)
                return 0;
        }
        fc_areas[i].size = size;
        fc_areas[i].cut = 0;
        __atomic_store_n(&fc_areas[i].begin, begin, __ATOMIC_RELEASE);
        return &fc_areas[i];
    }
    return 0;
}

static inline void fc_area_leave(struct fc_area *area) {
    __atomic_store_n(&area->begin, 0, __ATOMIC_RELEASE);
}

#endif
