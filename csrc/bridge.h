// From torch to plain data: checks every shape, dtype and device, allocates the outputs, fills
// AttnParams. Serves the CPU and the CUDA library; the only header that includes torch (its stable
// ABI). A wrong argument raises RuntimeError here, whoever calls the operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "params.h"

namespace attnpool {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64");
  return Dtype::float32;
}

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16: return ScalarType::Half;
    case Dtype::bfloat16: return ScalarType::BFloat16;
    case Dtype::float32: return ScalarType::Float;
    default: return ScalarType::Double;
  }
}

// The type of sums, softmax and LSE.
inline Dtype accumulator(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

using Shape = std::vector<int64_t>;

inline std::string text(const int64_t* sizes, size_t count) {
  std::string out = "[";
  for (size_t i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

// Reads sizes and strides of x, which must have this shape and dtype and lie on the device of q.
// leading_molecules: the first dimension counts molecules, not rows.
class Reader {
 public:
  explicit Reader(const Tensor& q) : device_(device(q)) {}

  void same_device(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(device(x) == device_, name, " must be on the device of q");
  }

  View read(const Tensor& x, const char* name, Dtype dtype, const Shape& shape,
            bool leading_molecules) const {
    const auto sizes = x.sizes();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
    STD_TORCH_CHECK(same, name, " must have shape ", text(shape.data(), shape.size()), ", got ",
                    text(sizes.data(), sizes.size()));
    STD_TORCH_CHECK(x.scalar_type() == scalar_type(dtype), name, " has another dtype than needed");
    same_device(x, name);
    return view(x, leading_molecules);
  }

  static View view(const Tensor& x, bool leading_molecules) {
    const auto strides = x.strides();
    View out{x.data_ptr(), 0, 0, 0, 0};
    size_t i = 0;
    if (leading_molecules) out.molecule = strides[i++];
    out.row = strides[i++];
    out.head = strides[i++];
    if (i < strides.size()) out.unit = strides[i];
    return out;
  }

 private:
  using Device = std::pair<int32_t, int32_t>;

  static Device device(const Tensor& x) {
    int32_t type = 0, index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
    return {type, index};
  }

  Device device_;
};

// Uninitialised, contiguous, on the device of q.
inline Tensor empty(const Tensor& q, const Shape& shape, Dtype dtype) {
  return torch::stable::new_empty(q, shape, scalar_type(dtype));
}

// What every pass reads; attnpool_kernels/operands.py tells the shapes.
struct Operands {
  const Tensor &q, &k, &v;
  const OptionalTensor& bias;
  const OptionalTensor& key_bias;
  const OptionalTensor& q_ptr;
  const Tensor& k_ptr;
  const OptionalTensor& pair_ptr;
  const OptionalTensor& seed;
};

struct Options {
  double scale, dropout;
};

// One call: shapes, and AttnParams that grows from the operands to the results.
struct Call {
  const Tensor& q;
  Reader reader;
  AttnParams a{};
  Shape q_shape, k_shape, v_shape, bias_shape, key_bias_shape, out_shape, lse_shape;
  Dtype sums;

  Call(const Operands& in, const Options& options) : q(in.q), reader(in.q) {
    for (const auto& [name, x] : {std::pair("q", &in.q), {"k", &in.k}, {"v", &in.v}})
      STD_TORCH_CHECK(x->dim() == 3, name, " must have 3 dimensions [rows, heads, width], got ",
                      x->dim());
    a.dtype = dtype_of(in.q, "q");
    sums = accumulator(a.dtype);
    a.query_rows = in.q.size(0);
    a.heads = in.q.size(1);
    a.head_dim = in.q.size(2);
    a.key_rows = in.k.size(0);
    a.value_dim = in.v.size(2);
    STD_TORCH_CHECK(1 <= a.heads && 1 <= a.head_dim && 1 <= a.value_dim,
                    "number of heads, head and value widths must be at least 1, got ", a.heads,
                    ", ", a.head_dim, " and ", a.value_dim);
    q_shape = {a.query_rows, a.heads, a.head_dim};
    k_shape = {a.key_rows, a.heads, a.head_dim};
    v_shape = {a.key_rows, a.heads, a.value_dim};
    a.q = Reader::view(in.q, false);
    a.k = reader.read(in.k, "k", a.dtype, k_shape, false);
    a.v = reader.read(in.v, "v", a.dtype, v_shape, false);
    read_ptr(in);
    if (a.shared_seeds) {
      out_shape = {a.molecules, a.query_rows, a.heads, a.value_dim};
      lse_shape = {a.molecules, a.query_rows, a.heads};
    } else {
      out_shape = {a.query_rows, a.heads, a.value_dim};
      lse_shape = {a.query_rows, a.heads};
    }
    read_bias(in);
    read_key_bias(in);
    read_dropout(in, options.dropout);
    a.scale = options.scale;
  }

  // Results of the first pass and their cotangents.
  void read_result(const Tensor& out, const Tensor& lse, const Tensor& dout,
                   const OptionalTensor& dlse) {
    a.out = rows(out, "out", out_shape);
    a.lse = statistics(lse, "lse");
    a.dout = rows(dout, "dout", out_shape);
    if (dlse) a.dlse = statistics(*dlse, "dlse");
  }
  View optional_rows(const OptionalTensor& x, const char* name, const Shape& shape) const {
    return x ? rows(*x, name, shape) : View{};
  }
  View optional_bias(const OptionalTensor& x, const char* name) const {
    STD_TORCH_CHECK(!bias_shape.empty() || !x, name, " needs bias");
    return x ? reader.read(*x, name, a.bias_dtype, bias_shape, false) : View{};
  }
  View optional_key_bias(const OptionalTensor& x, const char* name) const {
    STD_TORCH_CHECK(!key_bias_shape.empty() || !x, name, " needs key_bias");
    return x ? reader.read(*x, name, a.key_bias_dtype, key_bias_shape, false) : View{};
  }

  // Allocates and puts the view of the new tensor into to.
  Tensor new_rows(const Shape& shape, View& to) const {
    Tensor x = empty(q, shape, a.dtype);
    to = Reader::view(x, shape.size() == 4);
    return x;
  }
  Tensor new_statistics(View& to) const {
    Tensor x = empty(q, lse_shape, sums);
    to = Reader::view(x, lse_shape.size() == 3);
    return x;
  }
  // [P, H], or [0, H] with to left absent where there is no bias or it is not wanted.
  Tensor new_bias(bool wanted, View& to) const {
    return new_added(wanted ? bias_shape : Shape{}, a.bias_dtype, to);
  }
  // [N_k, H], or [0, H] with to left absent where there is no key bias.
  Tensor new_key_bias(View& to) const { return new_added(key_bias_shape, a.key_bias_dtype, to); }

 private:
  Tensor new_added(const Shape& shape, Dtype dtype, View& to) const {
    if (shape.empty()) return empty(q, {0, a.heads}, dtype);
    Tensor x = empty(q, shape, dtype);
    to = Reader::view(x, false);
    return x;
  }
  View rows(const Tensor& x, const char* name, const Shape& shape) const {
    return reader.read(x, name, a.dtype, shape, shape.size() == 4);
  }
  View statistics(const Tensor& x, const char* name) const {
    return reader.read(x, name, sums, lse_shape, lse_shape.size() == 3);
  }

  // The data of a contiguous vector of `count` integers.
  const void* integers(const Tensor& x, const char* name, ScalarType type, int64_t count) const {
    STD_TORCH_CHECK(
        x.scalar_type() == type && x.dim() == 1 && x.numel() == count && x.is_contiguous(), name,
        " must be contiguous ", type == ScalarType::Long ? "int64" : "int32", " with shape [",
        count, "]");
    reader.same_device(x, name);
    return x.data_ptr();
  }

  void read_ptr(const Operands& in) {
    const ScalarType type = in.k_ptr.scalar_type();
    const int64_t boundaries = in.k_ptr.numel();
    STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && boundaries >= 1,
                    "k_ptr must be int32 or int64 with shape [molecules + 1]");
    a.ptr_is_64 = type == ScalarType::Long;
    a.molecules = boundaries - 1;
    a.k_ptr = integers(in.k_ptr, "k_ptr", type, boundaries);
    a.shared_seeds = !in.q_ptr;
    if (in.q_ptr) a.q_ptr = integers(*in.q_ptr, "q_ptr", type, boundaries);
  }

  void read_bias(const Operands& in) {
    a.bias_dtype = a.dtype;
    STD_TORCH_CHECK(in.bias.has_value() == in.pair_ptr.has_value(),
                    "bias and pair_ptr must be given together");
    if (!in.bias) return;
    STD_TORCH_CHECK(in.bias->dim() == 2, "bias must have 2 dimensions [pairs, heads], got ",
                    in.bias->dim());
    a.bias_dtype = added_dtype(*in.bias, "bias");
    a.pairs = in.bias->size(0);
    bias_shape = {a.pairs, a.heads};
    a.bias = reader.read(*in.bias, "bias", a.bias_dtype, bias_shape, false);
    a.pair_ptr = static_cast<const int64_t*>(
        integers(*in.pair_ptr, "pair_ptr", ScalarType::Long, a.molecules + 1));
  }

  void read_key_bias(const Operands& in) {
    a.key_bias_dtype = a.dtype;
    if (!in.key_bias) return;
    a.key_bias_dtype = added_dtype(*in.key_bias, "key_bias");
    key_bias_shape = {a.key_rows, a.heads};
    a.key_bias = reader.read(*in.key_bias, "key_bias", a.key_bias_dtype, key_bias_shape, false);
  }

  // The dtype of what is added to the logits.
  Dtype added_dtype(const Tensor& x, const char* name) const {
    const Dtype dtype = dtype_of(x, name);
    STD_TORCH_CHECK(dtype == a.dtype || dtype == Dtype::float32, name,
                    " must have the dtype of q or float32");
    return dtype;
  }

  void read_dropout(const Operands& in, double dropout) {
    STD_TORCH_CHECK(dropout >= 0 && dropout < 1, "dropout must be in [0, 1), got ", dropout);
    a.keep_scale = 1 / (1 - dropout);
    a.drop_threshold = static_cast<uint32_t>(std::floor(dropout * 4294967296.0));
    STD_TORCH_CHECK(in.seed.has_value() == (dropout > 0),
                    "seed must be given exactly when dropout is above 0");
    if (in.seed)
      a.seed = static_cast<const int64_t*>(integers(*in.seed, "seed", ScalarType::Long, 1));
  }
};

// A kernel is reached with grad mode on only where no input requires grad, or where nobody
// registered a derivative: then the result would come without its gradient, and a force without its
// part of the attention. The stable ABI does not tell whether a tensor requires grad, but an inner
// node of a graph is no leaf.
inline void refuse_to_lose_gradients(std::initializer_list<OptionalTensor> inputs) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (const OptionalTensor& x : inputs) {
    if (!x) continue;
    StableIValue stack[] = {torch::stable::detail::from(*x)};
    TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("aten::is_leaf", "", stack));
    STD_TORCH_CHECK(torch::stable::detail::to<bool>(stack[0]),
                    "attnpool: an input requires grad, but nothing here has registered the "
                    "derivative of the operator: in Python import attnpool_kernels, in C++ call "
                    "attnpool_autograd::attention (python -m attnpool_kernels.deploy --help)");
  }
}

}  // namespace attnpool
