// The functions that exist as fast:: and as precise::. Included once for each, inside its namespace: no include guard.
EMU_UNARY(exp, EMU_RESULT(expf(x)))
EMU_UNARY(exp2, EMU_RESULT(exp2f(x)))
EMU_UNARY(exp10, EMU_RESULT(exp10f(x)))
EMU_UNARY(log, EMU_RESULT(logf(x)))
EMU_UNARY(log2, EMU_RESULT(log2f(x)))
EMU_UNARY(log10, EMU_RESULT(log10f(x)))
EMU_UNARY(sin, EMU_RESULT(sinf(x)))
EMU_UNARY(cos, EMU_RESULT(cosf(x)))
EMU_UNARY(tan, EMU_RESULT(tanf(x)))
EMU_UNARY(sinpi, EMU_RESULT(sinf(M_PI_F * (x - 2.0f * __builtin_rintf(0.5f * x)))))
EMU_UNARY(cospi, EMU_RESULT(cosf(M_PI_F * (x - 2.0f * __builtin_rintf(0.5f * x)))))
EMU_UNARY(tanpi, EMU_RESULT(tanf(M_PI_F * (x - __builtin_rintf(x)))))
EMU_UNARY(asin, EMU_RESULT(asinf(x)))
EMU_UNARY(acos, EMU_RESULT(acosf(x)))
EMU_UNARY(atan, EMU_RESULT(atanf(x)))
EMU_UNARY(sinh, EMU_RESULT(sinhf(x)))
EMU_UNARY(cosh, EMU_RESULT(coshf(x)))
EMU_UNARY(tanh, EMU_RESULT(tanhf(x)))
EMU_UNARY(asinh, EMU_RESULT(asinhf(x)))
EMU_UNARY(acosh, EMU_RESULT(acoshf(x)))
EMU_UNARY(atanh, EMU_RESULT(atanhf(x)))
EMU_UNARY(sqrt, EMU_RESULT(__builtin_sqrtf(x)))
EMU_UNARY(rsqrt, EMU_RESULT(1.0f / __builtin_sqrtf(x)))
EMU_BINARY(pow, EMU_RESULT(powf(x, y)))
EMU_BINARY(powr, EMU_RESULT(powf(x, y)))
EMU_BINARY(fmod, EMU_RESULT(fmodf(x, y)))
EMU_BINARY(atan2, EMU_RESULT(atan2f(x, y)))
EMU_BINARY(divide, EMU_RESULT(x / y))
template <class T>
EMU_FUNC T sincos(T x, thread T& cosine) {
  cosine = cos(x);
  return sin(x);
}
