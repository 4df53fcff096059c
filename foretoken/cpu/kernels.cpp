// One decoding step on a processor: few rows against all weights, few queries against a long cache.
//
// Whatever the number of rows, every sum is taken in the same order: an output of `linear` over its inputs one after
// the other, one of `attend` over positions, not slots. A node of a tree so gets the very bits that it would get if its
// path were decoded token by token, in any batch, in every type.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdlib>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "emission.h"
#include "linear.h"
#include "program.h"

namespace {

template <class Work>
void by_type(const Tensor& x, Work&& work) {
  switch (x.scalar_type()) {
    case at::kFloat: return work(float{});
    case at::kDouble: return work(double{});
    case at::kBFloat16: return work(c10::BFloat16{});
    default: TORCH_CHECK(false, "foretoken's kernels take float32, float64 and bfloat16, not ", x.scalar_type());
  }
}

// A tensor like x that nobody wrote, without torch's search for who makes it.
Tensor blank(at::IntArrayRef shape, const Tensor& x) { return at::detail::empty_cpu(shape, x.options()); }

// So many values of x's type that nobody wrote, in pages of 2 MiB where the system has them: whoever reads them one
// after the other waits for no table of pages.
Tensor room(const Tensor& x, int64_t values) {
  constexpr size_t PAGE = size_t(2) << 20;
  const size_t bytes = (size_t(values) * x.element_size() + PAGE - 1) / PAGE * PAGE;
  void* begin = std::aligned_alloc(PAGE, bytes);
  TORCH_CHECK(begin || !bytes, "no memory for ", bytes, " bytes");
#if defined(MADV_HUGEPAGE)
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  return at::from_blob(begin, {values}, [](void* p) { std::free(p); }, x.options());
}

// Put weights [N, K], one below the other, into `packed` [ceil(N / block), ceil(K / pair), block, pair]; zeros where
// there is none. Straight from where they lie: no second copy of a weight is ever held.
void pack(Tensor& packed, at::TensorList weights) {
  by_type(packed, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t P = Kind<T>::pair, BLOCK = block_of<T>();
    const int64_t K = weights[0].size(1), cells = (K + P - 1) / P;
    std::vector<std::pair<const T*, int64_t>> rows;  // where each begins, and from value to value
    for (const Tensor& w : weights) {
      TORCH_CHECK(w.scalar_type() == packed.scalar_type() && w.size(1) == K, "weights of several types or widths");
      for (int64_t n = 0; n < w.size(0); n++) rows.emplace_back(w.const_data_ptr<T>() + n * w.stride(0), w.stride(1));
    }
    const int64_t N = rows.size(), blocks = (N + BLOCK - 1) / BLOCK;
    TORCH_CHECK(packed.is_contiguous() && packed.sizes() == at::IntArrayRef({blocks, cells, BLOCK, P}),
                "a place of other sizes than the weights packed");
    T* to = packed.data_ptr<T>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++)
        for (int64_t n = 0; n < BLOCK; n++) {
          const int64_t row = block * BLOCK + n;
          const auto [from, step] = row < N ? rows[row] : std::pair<const T*, int64_t>{};
          for (int64_t k = 0; k < cells * P; k++)
            to[((block * cells + k / P) * BLOCK + n) * P + k % P] = from && k < K ? from[k * step] : T(0);
        }
    });
  });
}

// [..., outputs] of x [..., K] and a packed weight.
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = blank(shape, x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    TORCH_CHECK(packed.scalar_type() == x.scalar_type() && packed.size(1) * packed.size(3) >= x.size(-1) &&
                packed.size(0) * packed.size(2) >= outputs, "a weight packed for other inputs");
    multiply<T>(x.is_contiguous() ? x : x.contiguous(), packed, bias ? bias->const_data_ptr<T>() : nullptr, y);
  });
  return y;
}

// A copy: what is fused around it is computed before it and not again behind it.
Tensor keep(const Tensor& x) { return x.clone(); }

// Put new keys [B, K, N, D] and values [B, K, N, E] into the slots [B, N] of a layer's [B, K, S, D] and [B, K, S, E].
void write(Tensor& keys, Tensor& values, const Tensor& new_keys, const Tensor& new_values, const Tensor& slot) {
  const int64_t B = slot.size(0), N = slot.size(1), heads = keys.size(1);
  const Tensor slots = slot.contiguous();
  const auto copy = [&](Tensor& store, const Tensor& fresh) {
    TORCH_CHECK(store.stride(3) == 1 && fresh.stride(3) == 1 && store.scalar_type() == fresh.scalar_type() &&
                store.size(3) == fresh.size(3), "keys and values unlike those of the cache");
    const int64_t bytes = fresh.element_size(), size = fresh.size(3) * bytes;
    char* to = static_cast<char*>(store.mutable_data_ptr());
    const char* from = static_cast<const char*>(fresh.const_data_ptr());
    const int64_t* at = slots.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < heads; k++)
        for (int64_t n = 0; n < N; n++) {
          const int64_t row = at[b * N + n];
          TORCH_CHECK(0 <= row && row < store.size(2), "slot ", row, " of ", store.size(2));
          std::memcpy(to + (b * store.stride(0) + k * store.stride(1) + row * store.stride(2)) * bytes,
                      from + (b * fresh.stride(0) + k * fresh.stride(1) + n * fresh.stride(2)) * bytes, size);
        }
  };
  copy(keys, new_keys);
  copy(values, new_values);
}

// [B, N, H, E] attention of query [B, H, N, D] to keys [B, K, S, D] and values [B, K, S, E] by a plan
// [B, 1, N, 2 + M] int64: committed tokens, window (0: none), and whether a query sees each of M nodes behind them.
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& plan, double scale,
              double cap, const std::optional<Tensor>& sinks) {
  Tensor out = blank({query.size(0), query.size(2), query.size(1), values.size(3)}, query);
  const Tensor plans = plan.contiguous();
  TORCH_CHECK(query.stride(3) == 1 && keys.stride(3) == 1 && values.stride(3) == 1, "values must lie together");
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    attend_all<T>(query, keys, values, plans, scale, cap, sinks ? sinks->const_data_ptr<T>() : nullptr, out);
  });
  return out;
}

// [B, N] what is emitted at `position` [B, N] under values [B, N, V], temperature [B] float32 and noise of `key` [B].
Tensor race(const Tensor& values, const Tensor& temperature, const Tensor& key, const Tensor& position) {
  const int64_t B = values.size(0), N = values.size(1), V = values.size(2);
  const Tensor v = values.contiguous(), p = position.contiguous(), t = temperature.contiguous();
  const Tensor k = key.contiguous();
  Tensor out = at::empty({B, N}, position.options());
  by_type(v, [&](auto zero) {
    using T = decltype(zero);
    const auto one = [&](int64_t i, float* rough, float* peaks) {
      const Stream stream(k.const_data_ptr<int64_t>()[i / N], p.const_data_ptr<int64_t>()[i]);
      return Race<T>{v.const_data_ptr<T>() + i * V, V, t.const_data_ptr<float>()[i / N], stream, rough, peaks};
    };
    race_all<T>(B * N, V, one, out.data_ptr<int64_t>());
  });
  return out;
}

// Move the nodes of `path` [B, N], `count` [B] of them, to the first slots behind the `length` [B] committed ones of
// every store [B, K, S, D]. A path rises, so no node is overwritten before it has moved.
void move(at::TensorList stores, const Tensor& path, const Tensor& length, const Tensor& count) {
  const int64_t B = path.size(0), N = path.size(1);
  const Tensor paths = path.contiguous(), before = length.contiguous(), number = count.contiguous();
  const int64_t *nodes = paths.const_data_ptr<int64_t>(), *lengths = before.const_data_ptr<int64_t>();
  const int64_t* counts = number.const_data_ptr<int64_t>();
  for (const Tensor& store : stores) {
    const int64_t S = store.size(2), bytes = store.element_size(), size = store.size(3) * bytes;
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < store.size(1); k++) {
        char* rows = static_cast<char*>(store.mutable_data_ptr()) + (b * store.stride(0) + k * store.stride(1)) * bytes;
        const int64_t step = store.stride(2) * bytes;
        for (int64_t i = 0; i < counts[b]; i++)
          if (const int64_t node = nodes[b * N + i]; node != i)
            std::memcpy(rows + (lengths[b] + i) % S * step, rows + (lengths[b] + node) % S * step, size);
      }
  }
}

TORCH_LIBRARY_FRAGMENT(foretoken, m) {
  m.class_<Program>("Program")
      .def(torch::init<std::string, Tensors, bool, std::vector<Numbers>>())
      .def("run", &Program::run)
      .def("repeat", &Program::repeat);
  const auto define = [&](const std::string& name, const std::string& signature) {
    // where there is a GPU, `operators.py` may have said so before
    if (!c10::Dispatcher::singleton().findSchema({"foretoken::" + name, ""})) m.def((name + signature).c_str());
  };
  define("room", "(Tensor x, int values) -> Tensor");
  define("pack", "(Tensor(a!) packed, Tensor[] weights) -> ()");
  define("linear", "(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
  define("keep", "(Tensor x) -> Tensor");
  define("write", "(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor slot) -> ()");
  define("attend", "(Tensor query, Tensor keys, Tensor values, Tensor plan, float scale, float cap, Tensor? sinks)"
                   " -> Tensor");
  define("race", "(Tensor values, Tensor temperature, Tensor key, Tensor position) -> Tensor");
  define("move", "(Tensor(a!)[] stores, Tensor path, Tensor length, Tensor count) -> ()");
}

TORCH_LIBRARY_IMPL(foretoken, CPU, m) {
  m.impl("room", room);
  m.impl("pack", pack);
  m.impl("linear", linear);
  m.impl("keep", keep);
  m.impl("write", write);
  m.impl("race", race);
  m.impl("move", move);
  m.impl("attend", attend);
}

}  // namespace

// What compiled programs call, without a look-up by name and a list of arguments (`kernels.shims` declares them).
using torch::aot_inductor::new_tensor_handle;

static at::Tensor& held(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

static std::optional<at::Tensor> maybe(const AtenTensorHandle* handle) {
  return handle ? std::make_optional(held(*handle)) : std::nullopt;
}

extern "C" {

AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle packed, const AtenTensorHandle* bias,
                                     int64_t outputs, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *out = new_tensor_handle(linear(held(x), held(packed), maybe(bias), outputs)); });
}

AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                                     AtenTensorHandle plan, double scale, double cap, const AtenTensorHandle* sinks,
                                     AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *out = new_tensor_handle(attend(held(query), held(keys), held(values), held(plan), scale, cap, maybe(sinks)));
  });
}

AOTITorchError aoti_torch_cpu_write(AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle new_keys,
                                    AtenTensorHandle new_values, AtenTensorHandle slot, AtenTensorHandle*) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { write(held(keys), held(values), held(new_keys), held(new_values), held(slot)); });
}

AOTITorchError aoti_torch_cpu_race(AtenTensorHandle values, AtenTensorHandle temperature, AtenTensorHandle key,
                                   AtenTensorHandle position, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *out = new_tensor_handle(race(held(values), held(temperature), held(key), held(position))); });
}

AOTITorchError aoti_torch_cpu_keep(AtenTensorHandle x, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *out = new_tensor_handle(keep(held(x))); });
}

}  // extern "C"
