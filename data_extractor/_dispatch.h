/* SPDX-License-Identifier: MIT */
/* Which kernels a processor has. */
#ifndef FLOWCHECK_DISPATCH_H
#define FLOWCHECK_DISPATCH_H

#include "_ll.h"
#include "_ll128.h"
#include "_plain.h"

/* The kernels of a name, NULL if this processor has not got them; "auto" are the fastest that it has. */
static const fc_kernels *fc_kernels_of(const char *name) {
    static const fc_kernels scalar = {fc_plain_scalar, fc_ll_scalar, fc_ll128_scalar};
    int best = strcmp(name, "auto") == 0;
#if defined(__x86_64__)
    static const fc_kernels avx2 = {fc_plain_avx2, fc_ll_avx2, fc_ll128_avx2};
    if ((best || strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2")) return &avx2;
#endif
    return best || strcmp(name, "scalar") == 0 ? &scalar : NULL;
}

#endif
