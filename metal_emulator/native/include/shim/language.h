// Metal's words in terms of OpenCL's, and the few types that both have under other names.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang diagnostic ignored "-Wunknown-attributes"
#pragma clang diagnostic ignored "-Wunknown-pragmas"

#include "../../interface.h"

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_SIMDGROUP_MATRIX__ 1
#define __HAVE_BFLOAT__ 1

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))

// Words that OpenCL keeps for itself and Metal does not.
#define local metal_name_local
#define global metal_name_global
#define generic metal_name_generic
#define pipe metal_name_pipe
#define event_t metal_name_event_t
#define queue_t metal_name_queue_t
#define read_only metal_name_read_only
#define write_only metal_name_write_only
#define atomic_int metal_name_atomic_int
#define atomic_uint metal_name_atomic_uint
#define atomic_float metal_name_atomic_float
#define atomic_ulong metal_name_atomic_ulong

// The shim's own functions. Without debug information of their own, their instructions have the line of the call: that
// is the line a finding shows.
#define EMU_FUNC inline __attribute__((always_inline, nodebug))
#define EMU_OUTLINE __attribute__((noinline, nodebug, no_sanitize("kernel-address")))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef ulong uintptr_t;
typedef __bf16 bfloat;

#define CHAR_BIT 8
#define SCHAR_MAX 127
#define SCHAR_MIN (-128)
#define CHAR_MAX 127
#define CHAR_MIN (-128)
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807L
#define LONG_MIN (-9223372036854775807L - 1)
#define ULONG_MAX 18446744073709551615UL

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define MAXHALF half(65504.0f)
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.19209290e-07f
#define HALF_MAX half(65504.0f)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(9.765625e-04f)

#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_PI_H half(3.14159265358979323846f)
#define M_E_H half(2.71828182845904523536f)
#define M_LOG2E_H half(1.44269504088896340736f)
#define M_LN2_H half(0.69314718055994530942f)
