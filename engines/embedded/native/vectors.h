// Vectors of float32 as wide as the machine's, and the numbers that are widened into them.
//
// Written with the compiler's vector types, so they work on any processor; intrinsics only where GCC makes
// poor code of a conversion. Compiled with -march=native.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffn_fusion {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t VecInt __attribute__((vector_size(kBytes)));
typedef uint32_t VecBits __attribute__((vector_size(kBytes)));
typedef float VecInMemory __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint16_t HalvesInMemory __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));
typedef int8_t BytesInMemory __attribute__((vector_size(kBytes / 4), aligned(1), may_alias));

struct BF16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BF16* out) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0;
}

inline Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
inline Vec load(const BF16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const HalvesInMemory*>(p), VecBits) << 16);
#endif
}
inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const BytesInMemory*>(p), VecInt),
                                 Vec);
#endif
}
inline void store(Vec v, float* p) { *reinterpret_cast<VecInMemory*>(p) = v; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kLanes];
  std::memcpy(lanes, &v, kBytes);
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
  return lanes[0];
#endif
}

// e^x for x <= 0 within 2 ulp of float32: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf).
inline Vec exp(Vec x) {
  const Vec low = (Vec){} - 87.0f;
  x = x < low ? low : x;
  const VecInt n = __builtin_convertvector(x * 1.44269504f - 0.5f, VecInt);
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = (Vec){} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vec)((n + 127) << 23);
}

inline Vec silu(Vec x) {
  const Vec e = exp(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : (Vec){} + 1.0f) / (e + 1.0f);
}

}  // namespace ffn_fusion
