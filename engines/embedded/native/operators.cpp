// The operators of engines/embedded/kernels.py, as programs compiled by AOTInductor call them.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "products.h"

using namespace ffn_fusion;

namespace {

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
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type,
                                 aoti_torch_device_type_cpu(), 0, &result));
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

// Calls work(pointer to x, pointer to weight) with the types that they have.
template <class Work>
void with_types(AtenTensorHandle x, AtenTensorHandle weight, const Work& work) {
  const bool bytes = dtype(weight) == aoti_torch_dtype_int8();
  if (dtype(x) == aoti_torch_dtype_float32()) {
    const float* const in = data<float>(x);
    bytes ? work(in, data<const int8_t>(weight)) : work(in, data<const float>(weight));
  } else {
    const BF16* const in = data<BF16>(x);
    bytes ? work(in, data<const int8_t>(weight)) : work(in, data<const BF16>(weight));
  }
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
    const long batch = size(x, 0), rows = size(weight, 0), columns = size(weight, 1);
    *result = empty({batch, rows}, logits ? aoti_torch_dtype_float32() : dtype(x));
    with_types(x, weight, [&](const auto* in, const auto* w) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
      const auto* const own_bias = data_or_null<Element>(bias);
      const auto* const own_scale = data_or_null<float>(scale);
      if (logits)
        linear(in, w, own_scale, own_bias, data<float>(*result), batch, rows, columns, tiles);
      else
        linear(in, w, own_scale, own_bias, data<Element>(*result), batch, rows, columns, tiles);
    });
  });
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_swiglu(AtenTensorHandle x, AtenTensorHandle gate,
                                                              AtenTensorHandle up,
                                                              AtenTensorHandle* gate_scale,
                                                              AtenTensorHandle* up_scale, int32_t tiles,
                                                              AtenTensorHandle* result) {
  return guarded([&] {
    const long batch = size(x, 0), rows = size(gate, 0), columns = size(gate, 1);
    *result = empty({batch, rows}, dtype(x));
    with_types(x, gate, [&](const auto* in, const auto* w) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
      swiglu(in, w, data<std::remove_reference_t<decltype(*w)>>(up), data_or_null<float>(gate_scale),
             data_or_null<float>(up_scale), data<Element>(*result), batch, rows, columns, tiles);
    });
  });
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_attention(AtenTensorHandle qkv, AtenTensorHandle cos,
                                                                 AtenTensorHandle sin, AtenTensorHandle keys,
                                                                 AtenTensorHandle values,
                                                                 AtenTensorHandle tables,
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

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_engine_store_prompt(
    AtenTensorHandle qkv, AtenTensorHandle cos, AtenTensorHandle sin, AtenTensorHandle keys,
    AtenTensorHandle values, AtenTensorHandle table, int64_t heads, AtenTensorHandle* result) {
  return guarded([&] {
    const long length = size(qkv, 0), all = heads + 2 * size(keys, 1);
    *result = empty({all, length, size(keys, 2)}, dtype(qkv));
    with_cache(keys, values, heads, [&](const auto& cache) {
      using Element = std::remove_pointer_t<decltype(cache.keys)>;
      store_prompt(data<Element>(qkv), data<float>(cos), data<float>(sin), cache, data<int64_t>(table),
                   length, data<Element>(*result));
    });
  });
}

}  // extern "C"