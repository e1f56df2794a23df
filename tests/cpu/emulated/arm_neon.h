// NEON in plain C, from SIMDe: found where the compiler has no such header.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
