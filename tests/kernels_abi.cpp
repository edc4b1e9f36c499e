// The kernels behind plain pointers, so that tests can call them without torch's tensors.

#include "attention.h"
#include "products.h"

using namespace ffn_fusion;

#define PRODUCTS(name, Input, Weight)                                                                        \
  void linear_##name(const Input* x, const Weight* w, const float* scale, const Input* bias, float* y,       \
                     long batch, long rows, long columns, int tiles) {                                       \
    linear(x, w, scale, bias, y, batch, rows, columns, tiles);                                               \
  }                                                                                                          \
  void swiglu_##name(const Input* x, const Weight* gate, const Weight* up, const float* gate_scale,          \
                     const float* up_scale, Input* y, long batch, long rows, long columns, int tiles) {      \
    swiglu(x, gate, up, gate_scale, up_scale, y, batch, rows, columns, tiles);                               \
  }

#define ATTENTION(name, Element)                                                                             \
  void decode_##name(const Element* qkv, const float* cos, const float* sin, Element* keys, Element* values, \
                     const int64_t* tables, long table_size, const int64_t* positions, long batch,           \
                     long heads, long kv_heads, long head_dim, Element* out) {                               \
    const Cache<Element> cache{keys, values, {heads, kv_heads, head_dim}};                                   \
    decode_attention(qkv, cos, sin, cache, tables, table_size, positions, batch, out);                       \
  }                                                                                                          \
  void store_##name(const Element* qkv, const float* cos, const float* sin, Element* keys, Element* values,  \
                    const int64_t* table, long length, long heads, long kv_heads, long head_dim,             \
                    Element* out) {                                                                          \
    store_prompt(qkv, cos, sin, Cache<Element>{keys, values, {heads, kv_heads, head_dim}}, table, length,    \
                 out);                                                                                       \
  }

extern "C" {
PRODUCTS(float32, float, float)
PRODUCTS(bfloat16, BF16, BF16)
PRODUCTS(float32_int8, float, int8_t)
PRODUCTS(bfloat16_int8, BF16, int8_t)
ATTENTION(float32, float)
ATTENTION(bfloat16, BF16)
void exponential(const float* x, float* y, long count) {
  for (long i = 0; i < count; i += kLanes) store(exp(load(x + i)), y + i);
}
}
