// Products of a few vectors with a weight as it is stored, [rows, columns] row-major.
//
// A decode step reads each weight once, so its time is that of reading memory. Each sum is taken in an order
// that depends on the columns alone, never on the batch or the threads: a request gets the same numbers alone
// and in a crowd. A product is a class: its constructor prepares the vectors, its call multiplies them with
// some rows.

#pragma once

#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vectors.h"

namespace ffn_fusion {

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
      for (long j = k; j < columns; j++)  // fused in every tile: a row must not depend on its batch
        s = __builtin_fmaf(widen(weight[r * columns + j]), x[m * columns + j], s);
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
        whole ? tile<kRows, kColumns>(weight, r, m, out, stride)
              : tile<1, kColumns>(weight, r, m, out, stride);
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
      for (; m + 4 <= batch; m += 4)
        whole ? tile<4, 4>(weight, r, m, out, stride) : tile<1, 4>(weight, r, m, out, stride);
      for (; m < batch; m++)
        whole ? tile<4, 1>(weight, r, m, out, stride) : tile<1, 1>(weight, r, m, out, stride);
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

// AMX: 16 rows of a weight are tile A as they lie in memory, 16 vectors x are tile B, pairs of columns
// together. Tiles 0-3 are the sums of up to 64 vectors, 4 the weights, 5 the inputs. Only 16 rows at a time:
// rows are often a multiple of 2 KiB apart, and more of them would push each other out of the first cache.
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
    static thread_local std::vector<uint32_t>
        room;  // of the thread that begins a product; the others read it
    room.resize(std::max<size_t>(room.size(), steps_ * groups_ * 256));
    packed_ = room.data();
#pragma omp parallel for if (batch > 1 && steps_ * groups_ >= 64)
    for (long tile = 0; tile < steps_ * groups_; tile++) pack(x, batch, tile);
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
  // Tile B of 32 columns of 16 vectors: pairs of columns of each vector below one another.
  void pack(const BF16* x, long batch, long tile) const {
    const long first = tile / steps_ * 16, column = tile % steps_ * 32;
    uint32_t* const out = packed_ + tile * 256;
    for (long m = first; m < std::min(batch, first + 16); m++)
      for (long pair = 0; pair < 16; pair++)
        std::memcpy(out + pair * 16 + m - first, x + m * columns_ + column + 2 * pair, 4);
  }

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
  uint32_t* packed_;
};

#endif

inline void scale_rows(float* sums, const float* scale, long first, long count) {
  if (scale)
    for (long r = 0; r < count; r++) sums[r] *= scale[first + r];
}

// The vector at p, with zeros after the first `count` lanes.
inline Vec load_some(const float* p, long count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}

// Calls work(first, count) for pieces of `rows`, each on some thread.
template <class Work>
void in_pieces(long rows, const Work& work) {
  const long threads = omp_get_max_threads();
  const long piece = std::clamp((rows / (threads * 8) + 31) / 32 * 32, 32L, 256L);
#pragma omp parallel for schedule(dynamic, 1)
  for (long first = 0; first < rows; first += piece) work(first, std::min(piece, rows - first));
}

// Calls work(product) with the product that this machine has for these types. `tiles` is for batches that are
// often larger than 4. Products differ in the order of their sums, so a program must always say the same.
template <class Input, class Weight, class Work>
void with_product(const Input* x, const Weight*, long batch, long columns, [[maybe_unused]] bool tiles,
                  const Work& work) {
  if constexpr (std::is_same_v<Input, BF16>) {
#if defined(__AMX_BF16__)
    if (tiles && TileProduct::usable(columns)) {
      work(TileProduct(x, batch, columns));
      return;
    }
#endif
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Weight, BF16>) {
      if (PairProduct::usable(columns)) {
        work(PairProduct(x, batch, columns));
        return;
      }
    }
#endif
  }
  work(VectorProduct<Weight>(x, batch, columns));
}

// y[m][r] = (x[m] . weight[r]) scale[r] + bias[r]; scale and bias may be null.
template <class Input, class Weight, class Output>
void linear(const Input* x, const Weight* weight, const float* scale, const Input* bias, Output* y,
            long batch, long rows, long columns, bool tiles) {
  with_product(x, weight, batch, columns, tiles, [&](const auto& product) {
    in_pieces(rows, [&](long first, long count) {
      std::vector<float> sums(batch * count);
      product(weight + first * columns, count, batch, sums.data(), count);
      for (long m = 0; m < batch; m++)
        for (long r = 0; r < count; r++) {
          float value = sums[m * count + r] * (scale ? scale[first + r] : 1.0f);
          if (bias) value += widen(bias[first + r]);
          narrow(value, y + m * rows + first + r);
        }
    });
  });
}

// y[m][r] = silu(x[m] . gate[r]) (x[m] . up[r]), each product times its row's scale where there is one.
template <class Input, class Weight>
void swiglu(const Input* x, const Weight* gate, const Weight* up, const float* gate_scale,
            const float* up_scale, Input* y, long batch, long rows, long columns, bool tiles) {
  with_product(x, gate, batch, columns, tiles, [&](const auto& product) {
    in_pieces(rows, [&](long first, long count) {
      std::vector<float> gates(batch * count), ups(batch * count);
      product(gate + first * columns, count, batch, gates.data(), count);
      product(up + first * columns, count, batch, ups.data(), count);
      for (long m = 0; m < batch; m++) {
        scale_rows(&gates[m * count], gate_scale, first, count);
        scale_rows(&ups[m * count], up_scale, first, count);
        for (long r = 0; r < count; r += kLanes) {
          float out[kLanes];
          store(silu(load_some(&gates[m * count + r], count - r)) * load_some(&ups[m * count + r], count - r),
                out);
          for (long i = 0; i < std::min<long>(kLanes, count - r); i++)
            narrow(out[i], y + m * rows + first + r + i);
        }
      }
    });
  });
}

}  // namespace ffn_fusion
