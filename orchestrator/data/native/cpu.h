/* What this processor can do, asked of it directly: zig's C compiler answers __builtin_cpu_supports() with no to all. */
#ifndef ORCHESTRATOR_CPU_H
#define ORCHESTRATOR_CPU_H

#if defined(__x86_64__)
#include <cpuid.h>

enum { CPU_AVX2 = 1 << 5, CPU_BMI2 = 1 << 8 }; /* in EBX of leaf 7 */
enum { OSXSAVE = 1 << 27, VECTOR_STATE = 6 };  /* in ECX of leaf 1; XMM and YMM in XCR0 */

/* Whether the system keeps the vector registers of 256 bits when it switches threads. */
static int system_keeps_avx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return 0;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & VECTOR_STATE) == VECTOR_STATE;
}

static unsigned cpu_features(void) {
    unsigned a, b, c, d;
#ifdef PLAIN_CPU
    return 0;
#endif
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (b & CPU_BMI2) | (system_keeps_avx() ? b & CPU_AVX2 : 0);
}

static int cpu_has(unsigned feature) {
    static int known = -1; /* a virtual machine takes microseconds to answer; threads that ask at once write the same */
    if (known < 0) known = (int)cpu_features();
    return ((unsigned)known & feature) != 0;
}
#endif

#endif
