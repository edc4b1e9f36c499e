// Attention over the paged KV cache: a decode step, and the storing of a prompt.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace ffn_fusion {

constexpr int kBlock = 64;  // tokens of a block of the KV cache: BLOCK_SIZE of engines/embedded/step.py

// A block of the cache holds, for each KV head, K as [head_dim, kBlock] and V as [kBlock, head_dim]: sums
// over K run along tokens, sums over V along head_dim, and neither is ever added across lanes.
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
    std::fill(s + length, s + width, -std::numeric_limits<float>::infinity());
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

// A prompt of `length` tokens: rotated into out [heads + 2 kv_heads, length, head_dim], K and V stored as
// well.
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
      if (h >= shape.heads)
        cache.put(table, t, h - shape.heads, rotated.data(), x + shape.kv_heads * head_dim);
    }
  }
}

}  // namespace ffn_fusion
