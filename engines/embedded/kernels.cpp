// The kernels of one decode step on a CPU, and their entry points for programs compiled by AOTInductor.
//
// Weights stay as they are stored, [rows, columns] row-major: a decode step reads each of them once, so its
// time is that of reading memory. Each output is summed in an order that depends on the columns alone, never
// on the batch or the threads, so a request gets the same numbers alone and in a crowd.
//
// Compiled with -march=native. AMX and AVX512-BF16 are used for bfloat16 where the machine has them; the rest
// is written with the compiler's vector types and runs on any processor.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

constexpr int kBlock = 64;  // tokens of a block of the KV cache: BLOCK_SIZE of engines/embedded/step.py

// ---------------------------------------------------------------- vectors

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
  return __builtin_convertvector(
      __builtin_convertvector(*reinterpret_cast<const BytesInMemory*>(p), VecInt), Vec);
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

// ---------------------------------------------------------------- matrix products

// out[m][r] = sum over k of weight[r][k] x[m][k], for kRows rows and kColumns vectors x.
template <int kRows, int kColumns>
struct Results {
  float value[kColumns][kRows];
};

constexpr int kAhead = 512;  // bytes of each row that are asked for before they are needed

// The address to prefetch: kAhead bytes on in row r, or past its end in the row kRows further down.
template <int kRows, class Weight>
inline void prefetch(const Weight* weight, long columns, int r, long k) {
  constexpr long kAway = kAhead / sizeof(Weight);
  const long at = k + kAway < columns ? r * columns + k + kAway : (r + kRows) * columns + k + kAway - columns;
  __builtin_prefetch(weight + at);
}

template <int kRows, int kColumns, class Weight>
inline Results<kRows, kColumns> multiply(const Weight* weight, const float* x, long columns) {
  constexpr int kSteps = 64 / sizeof(Weight) / kLanes > 0 ? 64 / sizeof(Weight) / kLanes : 1;
  constexpr int kStride = kSteps * kLanes;  // a cache line of a row, or a vector
  Vec total[kRows][kColumns];
  for (int r = 0; r < kRows; r++)
    for (int m = 0; m < kColumns; m++) total[r][m] = (Vec){};
  const auto add = [&](long k) __attribute__((always_inline)) {
    Vec w[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) w[r] = load(weight + r * columns + k);
#pragma GCC unroll 8
    for (int m = 0; m < kColumns; m++) {
      const Vec v = load(x + m * columns + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) total[r][m] += w[r] * v;
    }
  };
  long k = 0;
  for (; k + kStride <= columns; k += kStride) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) prefetch<kRows>(weight, columns, r, k);
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; s++) add(k + s * kLanes);
  }
  for (; k + kLanes <= columns; k += kLanes) add(k);
  Results<kRows, kColumns> out;
  for (int r = 0; r < kRows; r++)
    for (int m = 0; m < kColumns; m++) {
      float s = sum(total[r][m]);
      for (long j = k; j < columns; j++) s += widen(weight[r * columns + j]) * x[m * columns + j];
      out.value[m][r] = s;
    }
  return out;
}

// Products of x [batch, columns] with rows of a weight, as `multiply` makes them.
template <class Weight>
class VectorProduct {
 public:
  static constexpr int kRows = kLanes == 16 ? 4 : 2;

  template <class Input>
  VectorProduct(const Input* x, long batch, long columns) : columns_(columns) {
    if constexpr (std::is_same_v<Input, float>) {
      x_ = x;
    } else {
      wide_.resize(batch * columns);
      for (long i = 0; i < batch * columns; i++) wide_[i] = widen(x[i]);
      x_ = wide_.data();
    }
  }

  // out[m * stride + r] for `count` rows from `weight` on and `batch` vectors.
  void operator()(const Weight* weight, long count, long batch, float* out, long stride) const {
    constexpr int kColumns = kLanes == 16 ? 6 : 4;
    long r = 0;
    if (batch == 1)
      for (; r + 2 * kRows <= count; r += 2 * kRows) tile<2 * kRows, 1>(weight, r, 0, out, stride);
    for (; r < count; r += r + kRows <= count ? kRows : 1) {
      const bool whole = r + kRows <= count;
      long m = 0;
      for (; m + kColumns <= batch; m += kColumns)
        whole ? tile<kRows, kColumns>(weight, r, m, out, stride) : tile<1, kColumns>(weight, r, m, out, stride);
      for (; m + 2 <= batch; m += 2)
        whole ? tile<kRows, 2>(weight, r, m, out, stride) : tile<1, 2>(weight, r, m, out, stride);
      for (; m < batch; m++)
        whole ? tile<kRows, 1>(weight, r, m, out, stride) : tile<1, 1>(weight, r, m, out, stride);
    }
  }

 private:
  template <int kR, int kM>
  void tile(const Weight* weight, long r, long m, float* out, long stride) const {
    const auto results = multiply<kR, kM>(weight + r * columns_, x_ + m * columns_, columns_);
    for (int i = 0; i < kM; i++)
      for (int j = 0; j < kR; j++) out[(m + i) * stride + r + j] = results.value[i][j];
  }

  long columns_;
  const float* x_;
  std::vector<float> wide_;
};

#if defined(__AVX512BF16__)

// AVX512-BF16: pairs of products are added as they are multiplied, without widening. VDPBF16PS.
class PairProduct {
 public:
  static bool usable(long columns) { return columns % 32 == 0; }

  PairProduct(const BF16* x, long, long columns) : columns_(columns), x_(x) {}

  void operator()(const BF16* weight, long count, long batch, float* out, long stride) const {
    long r = 0;
    if (batch == 1)
      for (; r + 8 <= count; r += 8) tile<8, 1>(weight, r, 0, out, stride);
    for (; r < count; r += r + 4 <= count ? 4 : 1) {
      const bool whole = r + 4 <= count;
      long m = 0;
      for (; m + 4 <= batch; m += 4) whole ? tile<4, 4>(weight, r, m, out, stride) : tile<1, 4>(weight, r, m, out, stride);
      for (; m < batch; m++) whole ? tile<4, 1>(weight, r, m, out, stride) : tile<1, 1>(weight, r, m, out, stride);
    }
  }

 private:
  static __m512bh pairs(const BF16* p) { return (__m512bh)_mm512_loadu_si512(p); }

  template <int kR, int kM>
  void tile(const BF16* weight, long r, long m, float* out, long stride) const {
    const BF16 *const w = weight + r * columns_, *const x = x_ + m * columns_;
    __m512 total[kR][kM];
    for (int i = 0; i < kR; i++)
      for (int j = 0; j < kM; j++) total[i][j] = _mm512_setzero_ps();
    for (long k = 0; k < columns_; k += 32) {
      __m512bh rows[kR];
#pragma GCC unroll 8
      for (int i = 0; i < kR; i++) {
        prefetch<kR>(w, columns_, i, k);
        rows[i] = pairs(w + i * columns_ + k);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kM; j++) {
        const __m512bh v = pairs(x + j * columns_ + k);
#pragma GCC unroll 8
        for (int i = 0; i < kR; i++) total[i][j] = _mm512_dpbf16_ps(total[i][j], rows[i], v);
      }
    }
    for (int i = 0; i < kR; i++)
      for (int j = 0; j < kM; j++) out[(m + j) * stride + r + i] = _mm512_reduce_add_ps(total[i][j]);
  }

  long columns_;
  const BF16* x_;
};

#endif

#if defined(__AMX_BF16__)

// AMX: 16 rows of a weight are tile A as they lie in memory, 16 vectors x are tile B, pairs of columns together.
// Tiles 0-3 are the sums of up to 64 vectors, 4 the weights, 5 the inputs. Only 16 rows at a time: rows are often
// a multiple of 2 KiB apart, and more of them would push each other out of the first cache.
// Intel's instruction set reference, TDPBF16PS.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

bool amx_allowed() {  // Linux lets a process have the tiles only once it has asked: arch/x86/xstate
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return allowed;
}

class TileProduct {
 public:
  static bool usable(long columns) { return columns % 32 == 0 && amx_allowed(); }

  TileProduct(const BF16* x, long batch, long columns)
      : columns_(columns), steps_(columns / 32), groups_((batch + 15) / 16) {
    static thread_local std::vector<uint32_t> packed;  // of the thread that begins the product; others read it
    packed.resize(std::max<size_t>(packed.size(), steps_ * groups_ * 256));
    packed_ = packed.data();
    for (long m = 0; m < batch; m++)
      for (long k = 0; k < columns; k += 2) {
        const long at = ((m / 16 * steps_ + k / 32) * 16 + k % 32 / 2) * 16 + m % 16;
        std::memcpy(&packed[at], x + m * columns + k, 4);
      }
  }

  template <class Weight>
  void operator()(const Weight* weight, long count, long batch, float* out, long stride) const {
    configure(std::min(batch, 16L));
    long r = 0;
    for (; r + 16 <= count; r += 16) rows(weight + r * columns_, batch, out + r, stride, 16);
    if (r < count) {  // the last rows, filled up with zeros
      std::vector<Weight> padded(16 * columns_);
      std::memcpy(padded.data(), weight + r * columns_, (count - r) * columns_ * sizeof(Weight));
      rows(padded.data(), batch, out + r, stride, count - r);
    }
    _tile_release();
  }

 private:
  static void configure(long vectors) {
    TileConfig config;
    for (int i = 0; i < 6; i++) {
      config.rows[i] = 16;
      config.bytes[i] = i == 4 ? 64 : 4 * vectors;
    }
    _tile_loadconfig(&config);
  }

  // 16 rows, all vectors, 64 at a time.
  template <class Weight>
  void rows(const Weight* weight, long batch, float* out, long stride, long wanted) const {
    alignas(64) float sums[4][16][16];
    for (long group = 0; group < groups_; group += 4) {
      const long together = std::min(4L, groups_ - group);
      if (together == 1) add_tiles<1>(weight, group, sums);
      if (together == 2) add_tiles<2>(weight, group, sums);
      if (together == 3) add_tiles<3>(weight, group, sums);
      if (together == 4) add_tiles<4>(weight, group, sums);
      for (long m = group * 16; m < std::min(batch, (group + 4) * 16); m++)
        for (long r = 0; r < wanted; r++) out[m * stride + r] = sums[m / 16 - group][r][m % 16];
    }
  }

  template <int kGroups, class Weight>
  void add_tiles(const Weight* weight, long group, float (*sums)[16][16]) const {
    const uint32_t* const x = packed_ + group * steps_ * 256;
    alignas(64) BF16 wide[16][32];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long step = 0; step < steps_; step++) {
      if (group == 0 && step * 32 % (64 / static_cast<long>(sizeof(Weight))) == 0)
        for (int r = 0; r < 16; r++) prefetch<16>(weight, columns_, r, step * 32);
      if constexpr (std::is_same_v<Weight, BF16>) {
        _tile_loadd(4, weight + step * 32, 2 * columns_);
      } else {
        for (int r = 0; r < 16; r++) widen32(weight + r * columns_ + step * 32, wide[r]);
        __asm__ volatile("" ::: "memory");  // a tile load does not tell the compiler that it reads
        _tile_loadd(4, wide, 64);
      }
      add<0, kGroups>(x + step * 256);
      add<1, kGroups>(x + step * 256);
      add<2, kGroups>(x + step * 256);
      add<3, kGroups>(x + step * 256);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }

  template <int kGroup, int kGroups>
  void add(const uint32_t* x) const {
    if constexpr (kGroup < kGroups) {
      _tile_loadd(5, x + kGroup * steps_ * 256, 64);
      if constexpr (kGroup == 0) _tile_dpbf16ps(0, 4, 5);
      if constexpr (kGroup == 1) _tile_dpbf16ps(1, 4, 5);
      if constexpr (kGroup == 2) _tile_dpbf16ps(2, 4, 5);
      if constexpr (kGroup == 3) _tile_dpbf16ps(3, 4, 5);
    }
  }

  static void widen32(const int8_t* from, BF16* to) {  // exact: bfloat16 holds all of -256..256
    const auto low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    const auto high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16))));
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  long columns_, steps_, groups_;
  const uint32_t* packed_;
};

#endif

// Calls work(first, count) for pieces of `rows`, each on some thread.
template <class Work>
void in_pieces(long rows, const Work& work) {
  const long threads = omp_get_max_threads();
  const long piece = std::clamp((rows / (threads * 8) + 31) / 32 * 32, 32L, 256L);
#pragma omp parallel for schedule(dynamic, 1)
  for (long first = 0; first < rows; first += piece) work(first, std::min(piece, rows - first));
}

// y[m][r] = (x[m] . weight[r]) scale[r] + bias[r]; scale and bias may be null.
template <class Product, class Weight, class Output>
void linear(const Product& product, const Weight* weight, const float* scale, const Output* bias, Output* y,
            float* logits, long batch, long rows, long columns) {
  in_pieces(rows, [&](long first, long count) {
    std::vector<float> out(batch * count);
    product(weight + first * columns, count, batch, out.data(), count);
    for (long m = 0; m < batch; m++)
      for (long r = 0; r < count; r++) {
        float value = out[m * count + r] * (scale ? scale[first + r] : 1.0f);
        if (bias) value += widen(bias[first + r]);
        if (logits)
          logits[m * rows + first + r] = value;
        else
          narrow(value, y + m * rows + first + r);
      }
  });
}

// y[m][r] = silu(x[m] . gate[r]) (x[m] . up[r])
template <class Product, class Weight, class Output>
void swiglu(const Product& product, const Weight* gate, const Weight* up, const float* gate_scale,
            const float* up_scale, Output* y, long batch, long rows, long columns) {
  in_pieces(rows, [&](long first, long count) {
    std::vector<float> out(2 * batch * count);
    float* const second = out.data() + batch * count;
    product(gate + first * columns, count, batch, out.data(), count);
    product(up + first * columns, count, batch, second, count);
    for (long m = 0; m < batch; m++)
      for (long r = 0; r < count; r += kLanes) {
        const long lanes = std::min<long>(kLanes, count - r);
        float g[kLanes] = {}, u[kLanes] = {};
        for (long i = 0; i < lanes; i++) {
          g[i] = out[m * count + r + i] * (gate_scale ? gate_scale[first + r + i] : 1.0f);
          u[i] = second[m * count + r + i] * (up_scale ? up_scale[first + r + i] : 1.0f);
        }
        store(silu(load(g)) * load(u), g);
        for (long i = 0; i < lanes; i++) narrow(g[i], y + m * rows + first + r + i);
      }
  });
}

// ---------------------------------------------------------------- attention over the paged KV cache

// A block of the cache holds, for each KV head, K as [head_dim, kBlock] and V as [kBlock, head_dim]: sums over
// K run along tokens, sums over V along head_dim, and neither is ever added across lanes.
struct Shape {
  long heads, kv_heads, head_dim;
  long head_block() const { return head_dim * kBlock; }
  long row() const { return (heads + 2 * kv_heads) * head_dim; }
};

template <class Element>
void rotate(const Element* x, const float* cos, const float* sin, long head_dim, float* out) {
  const long half = head_dim / 2;
  for (long i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    Element first, second;  // rounded as the cache rounds
    narrow(a * cos[i] - b * sin[i], &first);
    narrow(b * cos[i] + a * sin[i], &second);
    out[i] = widen(first), out[i + half] = widen(second);
  }
}

template <class Element>
struct Cache {
  Element *keys, *values;
  Shape shape;

  Element* head(Element* pool, long block, long kv) const {
    return pool + (block * shape.kv_heads + kv) * shape.head_block();
  }
  void put(const int64_t* table, long position, long kv, const float* key, const Element* value) const {
    const long block = table[position / kBlock], at = position % kBlock;
    Element* const k = head(keys, block, kv);
    for (long d = 0; d < shape.head_dim; d++) narrow(key[d], k + d * kBlock + at);
    std::memcpy(head(values, block, kv) + at * shape.head_dim, value, shape.head_dim * sizeof(Element));
  }
};

// One request's query heads of one KV head over `length` tokens. queries are [group, head_dim] and scaled;
// scores has room for [group, length rounded up to blocks].
template <class Element>
void attend(const Cache<Element>& cache, const int64_t* table, long length, long kv, const float* queries,
            float* scores, Element* out) {
  const long head_dim = cache.shape.head_dim, group = cache.shape.heads / cache.shape.kv_heads;
  const long blocks = (length + kBlock - 1) / kBlock, width = blocks * kBlock;
  constexpr int kVectors = kBlock / kLanes;
  for (long b = 0; b < blocks; b++) {
    const Element* const k = cache.head(cache.keys, table[b], kv);
    for (long g = 0; g < group; g++) {
      Vec total[kVectors] = {};
      for (long d = 0; d < head_dim; d++) {
        const float q = queries[g * head_dim + d];
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i++) total[i] += load(k + d * kBlock + i * kLanes) * q;
      }
      for (int i = 0; i < kVectors; i++) store(total[i], scores + g * width + b * kBlock + i * kLanes);
    }
  }
  std::vector<float> mixed(head_dim);
  for (long g = 0; g < group; g++) {
    float* const s = scores + g * width;
    const float largest = *std::max_element(s, s + length);
    std::fill(s + length, s + width, -INFINITY);
    Vec sums = {};
    for (long i = 0; i < width; i += kLanes) {
      const Vec centred = load(s + i) - largest;
      const Vec weight = centred < -87.0f ? (Vec){} : exp(centred);
      store(weight, s + i);
      sums += weight;
    }
    std::fill(mixed.begin(), mixed.end(), 0.0f);
    for (long i = 0; i < length; i++) {
      const Element* const v = cache.head(cache.values, table[i / kBlock], kv) + i % kBlock * head_dim;
      long d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) store(load(&mixed[d]) + load(v + d) * s[i], &mixed[d]);
      for (; d < head_dim; d++) mixed[d] += widen(v[d]) * s[i];
    }
    const float scale = 1.0f / sum(sums);
    for (long d = 0; d < head_dim; d++) narrow(mixed[d] * scale, out + g * head_dim + d);
  }
}

// A decode step: rows of qkv are rotated, K and V stored, and attention looks at all tokens so far.
template <class Element>
void decode_attention(const Element* qkv, const float* cos, const float* sin, const Cache<Element>& cache,
                      const int64_t* tables, long table_size, const int64_t* positions, long batch,
                      Element* out) {
  const Shape shape = cache.shape;
  const long group = shape.heads / shape.kv_heads, half = shape.head_dim / 2;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
#pragma omp parallel for schedule(dynamic, 1)
  for (long task = 0; task < batch * shape.kv_heads; task++) {
    const long b = task / shape.kv_heads, kv = task % shape.kv_heads, position = positions[b];
    const Element* const row = qkv + b * shape.row();
    const Element* const key = row + (shape.heads + kv) * shape.head_dim;
    const int64_t* const table = tables + b * table_size;
    std::vector<float> rotated(group * shape.head_dim), scores(group * (position / kBlock + 1) * kBlock);
    rotate(key, cos + b * half, sin + b * half, shape.head_dim, rotated.data());
    cache.put(table, position, kv, rotated.data(), key + shape.kv_heads * shape.head_dim);
    for (long g = 0; g < group; g++)
      rotate(row + (kv * group + g) * shape.head_dim, cos + b * half, sin + b * half, shape.head_dim,
             &rotated[g * shape.head_dim]);
    for (float& q : rotated) q *= scale;
    attend(cache, table, position + 1, kv, rotated.data(), scores.data(),
           out + (b * shape.heads + kv * group) * shape.head_dim);
  }
}

// A prompt of `length` tokens: rotated into out [heads + 2 kv_heads, length, head_dim], K and V stored as well.
template <class Element>
void store_prompt(const Element* qkv, const float* cos, const float* sin, const Cache<Element>& cache,
                  const int64_t* table, long length, Element* out) {
  const Shape shape = cache.shape;
  const long head_dim = shape.head_dim, half = head_dim / 2, turned = shape.heads + shape.kv_heads;
#pragma omp parallel for schedule(dynamic, 16)
  for (long t = 0; t < length; t++) {
    std::vector<float> rotated(head_dim);
    for (long h = 0; h < turned + shape.kv_heads; h++) {
      const Element* const x = qkv + t * shape.row() + h * head_dim;
      Element* const to = out + (h * length + t) * head_dim;
      if (h >= turned) {
        std::memcpy(to, x, head_dim * sizeof(Element));
        continue;
      }
      rotate(x, cos + t * half, sin + t * half, head_dim, rotated.data());
      for (long d = 0; d < head_dim; d++) narrow(rotated[d], to + d);
      if (h >= shape.heads) cache.put(table, t, h - shape.heads, rotated.data(), x + shape.kv_heads * head_dim);
    }
  }
}

// ---------------------------------------------------------------- tensors of AOTInductor's C interface

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw error;
}

template <class T>
T* data(AtenTensorHandle tensor) {
  void* pointer;
  check(aoti_torch_get_data_ptr(tensor, &pointer));
  return static_cast<T*>(pointer);
}
template <class T>
const T* data_or_null(AtenTensorHandle* tensor) {
  return tensor ? data<const T>(*tensor) : nullptr;
}
int64_t size(AtenTensorHandle tensor, int64_t dimension) {
  int64_t result;
  check(aoti_torch_get_size(tensor, dimension, &result));
  return result;
}
int32_t dtype(AtenTensorHandle tensor) {
  int32_t result;
  check(aoti_torch_get_dtype(tensor, &result));
  return result;
}
AtenTensorHandle empty(const std::vector<int64_t>& sizes, int32_t type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle result;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0,
                                 &result));
  return result;
}

template <class Work>
AOTITorchError guarded(const Work& work) {
  try {
    work();
    return AOTI_TORCH_SUCCESS;
  } catch (...) {
    return AOTI_TORCH_FAILURE;
  }
}

// Calls work(input pointer, weight pointer, product) with the types that x and weight have. `tiles` is for batches
// that are often larger than 4; the sums differ in their order, so a program always says the same.
template <class Work>
void with_product(AtenTensorHandle x, AtenTensorHandle weight, long batch, long columns, bool tiles, const Work& work) {
  const bool bytes = dtype(weight) == aoti_torch_dtype_int8();
  if (dtype(x) == aoti_torch_dtype_float32()) {
    const float* const in = data<float>(x);
    if (bytes)
      work(in, data<int8_t>(weight), VectorProduct<int8_t>(in, batch, columns));
    else
      work(in, data<float>(weight), VectorProduct<float>(in, batch, columns));
    return;
  }
  const BF16* const in = data<BF16>(x);
#if defined(__AMX_BF16__)
  if (tiles && TileProduct::usable(columns)) {
    const TileProduct product(in, batch, columns);
    bytes ? work(in, data<int8_t>(weight), product) : work(in, data<BF16>(weight), product);
    return;
  }
#endif
  if (bytes) {
    work(in, data<int8_t>(weight), VectorProduct<int8_t>(in, batch, columns));
    return;
  }
#if defined(__AVX512BF16__)
  if (PairProduct::usable(columns)) {
    work(in, data<BF16>(weight), PairProduct(in, batch, columns));
    return;
  }
#endif
  work(in, data<BF16>(weight), VectorProduct<BF16>(in, batch, columns));
}

template <class Work>
void with_cache(AtenTensorHandle keys, AtenTensorHandle values, int64_t heads, const Work& work) {
  const Shape shape{heads, size(keys, 1), size(keys, 2)};
  if (dtype(keys) == aoti_torch_dtype_float32())
    work(Cache<float>{data<float>(keys), data<float>(values), shape});
  else
    work(Cache<BF16>{data<BF16>(keys), data<BF16>(values), shape});
}

}  // namespace

extern "C" {

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_linear(AtenTensorHandle x, AtenTensorHandle weight,
                                                              AtenTensorHandle* scale, AtenTensorHandle* bias,
                                                              int32_t tiles, int32_t logits,
                                                              AtenTensorHandle* result) {
  return guarded([&] {
    const long batch = size(x, 0), columns = size(weight, 1), rows = size(weight, 0);
    *result = empty({batch, rows}, logits ? aoti_torch_dtype_float32() : dtype(x));
    with_product(x, weight, batch, columns, tiles, [&](auto* in, auto* w, const auto& product) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
      linear(product, w, data_or_null<float>(scale), data_or_null<Element>(bias),
             logits ? nullptr : data<Element>(*result), logits ? data<float>(*result) : nullptr, batch, rows,
             columns);
    });
  });
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_swiglu(AtenTensorHandle x, AtenTensorHandle gate,
                                                              AtenTensorHandle up, AtenTensorHandle* gate_scale,
                                                              AtenTensorHandle* up_scale, int32_t tiles,
                                                              AtenTensorHandle* result) {
  return guarded([&] {
    const long batch = size(x, 0), columns = size(gate, 1), rows = size(gate, 0);
    *result = empty({batch, rows}, dtype(x));
    with_product(x, gate, batch, columns, tiles, [&](auto* in, auto* w, const auto& product) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
      using Weight = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
      swiglu(product, w, data<const Weight>(up), data_or_null<float>(gate_scale), data_or_null<float>(up_scale),
             data<Element>(*result), batch, rows, columns);
    });
  });
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_attention(AtenTensorHandle qkv, AtenTensorHandle cos,
                                                                 AtenTensorHandle sin, AtenTensorHandle keys,
                                                                 AtenTensorHandle values, AtenTensorHandle tables,
                                                                 AtenTensorHandle positions, int64_t heads,
                                                                 AtenTensorHandle* result) {
  return guarded([&] {
    const long batch = size(qkv, 0);
    *result = empty({batch, heads * size(keys, 2)}, dtype(qkv));
    with_cache(keys, values, heads, [&](const auto& cache) {
      using Element = std::remove_pointer_t<decltype(cache.keys)>;
      decode_attention(data<Element>(qkv), data<float>(cos), data<float>(sin), cache, data<int64_t>(tables),
                       size(tables, 1), data<int64_t>(positions), batch, data<Element>(*result));
    });
  });
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_store_prompt(AtenTensorHandle qkv, AtenTensorHandle cos,
                                                                    AtenTensorHandle sin, AtenTensorHandle keys,
                                                                    AtenTensorHandle values,
                                                                    AtenTensorHandle table, int64_t heads,
                                                                    AtenTensorHandle* result) {
  return guarded([&] {
    const long length = size(qkv, 0), all = heads + 2 * size(keys, 1);
    *result = empty({all, length, size(keys, 2)}, dtype(qkv));
    with_cache(keys, values, heads, [&](const auto& cache) {
      using Element = std::remove_pointer_t<decltype(cache.keys)>;
      store_prompt(data<Element>(qkv), data<float>(cos), data<float>(sin), cache, data<int64_t>(table), length,
                   data<Element>(*result));
    });
  });
}

}  // extern "C"
