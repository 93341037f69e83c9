/* SPDX-License-Identifier: MIT
 *
 * FC_TARGET("avx2,..."): the function may use these instructions; its caller has asked the processor. DPDK's flags tune for one
 * without AVX2, for which gcc cuts every unaligned load and store of 32 bytes in two.
 */
#ifndef FLOWCHECK_VECTORS_H
#define FLOWCHECK_VECTORS_H

#if defined(__clang__)
#define FC_TARGET(features) __attribute__((target(features)))
#else
#define FC_TARGET(features) __attribute__((target(features ",tune=haswell")))
#endif

#endif
