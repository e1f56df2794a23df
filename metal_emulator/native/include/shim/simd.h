// <metal_simdgroup>: simd_sum, simd_shuffle_down, simd_ballot and so on.
#pragma once
#include "collectives.h"

EMU_COLLECTIVES(simd, emu_simdgroup)
