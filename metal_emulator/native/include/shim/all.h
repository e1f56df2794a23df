// Metal's standard library for kernels that are compiled as C++ for OpenCL 2021: real address spaces, qualified
// methods, half. Not here: textures, samplers, argument buffers, ray tracing, tensor operations. A kernel that uses
// them is refused.
#pragma once
#include "language.h"
#include "traits.h"
#include "vectors.h"
#include "bool_vectors.h"
#include "construct.h"
#include "packed.h"
#include "limits.h"
#include "arithmetic.h"
#include "math.h"
#include "relational.h"
#include "geometric.h"
#include "threads.h"
#include "simd.h"
#include "quad.h"
#include "matrix.h"
#include "atomic.h"
#include "logging.h"
