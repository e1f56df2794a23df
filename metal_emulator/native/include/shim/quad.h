// <metal_quadgroup>: quad_sum, quad_broadcast and so on.
#pragma once
#include "collectives.h"

EMU_COLLECTIVES(quad, emu_quadgroup)
