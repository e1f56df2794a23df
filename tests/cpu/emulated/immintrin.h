// AVX-512 and its relatives in plain C, from SIMDe: found before the compiler's own header, so that the kernels run where
// no such machine is at hand.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
