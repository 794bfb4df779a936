// libhikui_ops.so: ONNX Runtime operators of the domain `hikui` over the kernels that both backends share.
//
// One table says for each operator which kernel runs it and what its operands look like; everything else is common.
// Weights are constant inputs: their pointers lead into the mapped data file and are looked up once, at creation.
#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "ort_abi.h"
#include "symbols.inc"

namespace {

using namespace ort;

constexpr size_t kMaxOperands = 12;
constexpr size_t kMaxOutputs = 5;
constexpr size_t kMaxRank = 8;
constexpr int64_t kActivationPadding = 128;
constexpr int64_t kSumWidth = 32;

using Kernel = int32_t(void* self, const hikui_any* args, int32_t count, hikui_any* result);

// How an output's dimensions follow from those of input 0; kRows is a row of `out_features` for each element, kUpdated is a new version of another input, kWidened has the
// columns of another input.
enum class Shape : uint8_t { kSame, kOutFeatures, kRows, kPadded, kTokens, kSums, kUpdated, kWidened };

struct Input {
  ElementType type;
  Presence presence = kRequired;
};

struct Output {
  ElementType type;
  Shape shape;
  // for kUpdated: the input that the kernel overwrites, in a copy unless both share a buffer; for kWidened that input
  size_t other = 0;
};

struct Spec {
  const char* name;
  Kernel* kernel;
  const char* number;  // an attribute, passed to the kernel between inputs and outputs, or null: a float, but `rows`
  size_t inputs;
  Input input[kMaxOperands];
  size_t outputs;
  Output output[kMaxOutputs];
};

// Every weight format with integer codes: its name in operators, its name in symbols, what holds it.
#define HIKUI_ALIKE(X)                                                                                         \
  X(Sign, sign, kUint8) X(Int2, int2, kUint8) X(Ternary, ternary, kUint8) X(Int3, int3, kUint8)                \
  X(Int4, int4, kUint8) X(Nf4, nf4, kUint8) X(Fp4, fp4, kUint8) X(Int8, int8, kInt8)
#define HIKUI_WEIGHTS(X) HIKUI_ALIKE(X) X(Mixed, mixed, kUint8)
// The operator of a kernel, if this library holds it.
#define HIKUI_OPERATOR(NAME, SYMBOL, ...)                                                                      \
  HIKUI_KEEP_hikui_##SYMBOL({NAME, __tvm_ffi_hikui_##SYMBOL, __VA_ARGS__},)

#define HIKUI_PACKED_A8(weight) {kInt8}, {kFloat}, {kInt32}, {weight}, {kFloat16}, {kFloat, kOptional}
#define HIKUI_QUANTIZED {kInt8, Shape::kPadded}, {kFloat, Shape::kTokens}, {kInt32, Shape::kSums}
#define HIKUI_PRODUCTS(NAME, SYMBOL, WEIGHT)                                                                   \
  HIKUI_OPERATOR("LinearA8" #NAME, linear_a8_##SYMBOL, nullptr, 6, {HIKUI_PACKED_A8(WEIGHT)},                  \
                 1, {{kFloat, Shape::kOutFeatures}})                                                           \
  HIKUI_OPERATOR("LinearA8Branch" #NAME, linear_a8_branch_##SYMBOL, nullptr, 9,                                \
                 {HIKUI_PACKED_A8(WEIGHT), {kFloat}, {kFloat16}, {kFloat16}}, 1, {{kFloat, Shape::kOutFeatures}}) \
  HIKUI_OPERATOR("Linear" #NAME, linear_##SYMBOL, nullptr, 4,                                                  \
                 {{kFloat}, {WEIGHT}, {kFloat16}, {kFloat, kOptional}}, 1, {{kFloat, Shape::kOutFeatures}})
#define HIKUI_EMBEDDINGS(NAME, SYMBOL, WEIGHT)                                                                 \
  HIKUI_OPERATOR("Embedding" #NAME, embedding_##SYMBOL, kRowsAttribute, 3, {{kInt64}, {WEIGHT}, {kFloat16}},   \
                 1, {{kFloat, Shape::kRows}})

#define HIKUI_QUANTISED_CACHE(NAME, SYMBOL, CODES)                                                             \
  HIKUI_OPERATOR("Attention" #NAME, attention_##SYMBOL, "scale", 8,                                            \
                 {{kFloat}, {kFloat}, {kFloat}, {CODES}, {CODES}, {kFloat16}, {kFloat16}, {kInt64}},           \
                 5, {{kFloat, Shape::kSame}, {CODES, Shape::kUpdated, 3}, {CODES, Shape::kUpdated, 4},         \
                     {kFloat16, Shape::kUpdated, 5}, {kFloat16, Shape::kUpdated, 6}})                          \
  HIKUI_OPERATOR("CacheUpdate" #NAME, cache_update_##SYMBOL, nullptr, 4,                                       \
                 {{CODES}, {kFloat16}, {kFloat}, {kInt64}},                                                    \
                 3, {{kFloat, Shape::kWidened, 2}, {CODES, Shape::kUpdated, 0}, {kFloat16, Shape::kUpdated, 1}})

constexpr char kRowsAttribute[] = "rows";  // an integer

const Spec kSpecs[] = {
    HIKUI_WEIGHTS(HIKUI_PRODUCTS)
    HIKUI_ALIKE(HIKUI_EMBEDDINGS)
    HIKUI_OPERATOR("EmbeddingFloat16", embedding_float16, kRowsAttribute, 2, {{kInt64}, {kFloat16}},
                   1, {{kFloat, Shape::kRows}})
    HIKUI_OPERATOR("EmbeddingFloat32", embedding_float32, kRowsAttribute, 2, {{kInt64}, {kFloat}},
                   1, {{kFloat, Shape::kRows}})
    HIKUI_OPERATOR("QuantizeActivation", quantize_activation, nullptr, 1, {{kFloat}}, 3, {HIKUI_QUANTIZED})
    HIKUI_OPERATOR("QuantizeActivationInt4", quantize_activation_int4, nullptr, 1, {{kFloat}},
                   3, {HIKUI_QUANTIZED})
    HIKUI_OPERATOR("QuantizeActivationStatic", quantize_activation_static, nullptr, 2, {{kFloat}, {kFloat}},
                   3, {HIKUI_QUANTIZED})
    HIKUI_OPERATOR("LinearFloat32", linear_float32, nullptr, 3, {{kFloat}, {kFloat}, {kFloat, kOptional}},
                   1, {{kFloat, Shape::kOutFeatures}})
    HIKUI_OPERATOR("LinearFloat16", linear_float16, nullptr, 3, {{kFloat}, {kFloat16}, {kFloat, kOptional}},
                   1, {{kFloat, Shape::kOutFeatures}})
    HIKUI_OPERATOR("RmsNorm", rms_norm, "eps", 2, {{kFloat}, {kFloat}}, 1, {{kFloat, Shape::kSame}})
    HIKUI_OPERATOR("RmsNormQuantize", rms_norm_quantize, "eps", 2, {{kFloat}, {kFloat}},
                   4, {{kFloat, Shape::kSame}, HIKUI_QUANTIZED})
    HIKUI_OPERATOR("SwiGlu", swiglu, nullptr, 2, {{kFloat}, {kFloat}}, 1, {{kFloat, Shape::kSame}})
    HIKUI_OPERATOR("SwiGluQuantize", swiglu_quantize, nullptr, 2, {{kFloat}, {kFloat}},
                   4, {{kFloat, Shape::kSame}, HIKUI_QUANTIZED})
    HIKUI_OPERATOR("Rotary", rotary, nullptr, 3, {{kFloat}, {kFloat}, {kFloat}}, 1, {{kFloat, Shape::kSame}})
    HIKUI_OPERATOR("Attention", attention, "scale", 6,
                   {{kFloat}, {kFloat}, {kFloat}, {kFloat}, {kFloat}, {kInt64}},
                   3, {{kFloat, Shape::kSame}, {kFloat, Shape::kUpdated, 3}, {kFloat, Shape::kUpdated, 4}})
    HIKUI_QUANTISED_CACHE(Int8, int8, kInt8)
    HIKUI_QUANTISED_CACHE(Int4, int4, kUint8)
    {}  // the end, as a model may use none of them
};

constexpr size_t kOperators = sizeof(kSpecs) / sizeof(kSpecs[0]) - 1;

// Sizes beyond what any machine can address are refused before they are added to.
constexpr int64_t kMostColumns = int64_t{1} << 58;

int64_t padded(int64_t columns) { return (columns + kActivationPadding - 1) / kActivationPadding * kActivationPadding; }

// The dimensions of an output: those of input 0 with the last one replaced (where asked, by `columns`) or dropped, or one
// added.
size_t output_dims(Shape rule, int64_t columns, const int64_t* dims, size_t rank, int64_t* out) {
  if (rank == 0) return 0;
  memcpy(out, dims, rank * sizeof(int64_t));
  int64_t& last = out[rank - 1];
  switch (rule) {
    case Shape::kSame:
    case Shape::kUpdated: break;
    case Shape::kRows: out[rank] = columns; return rank + 1;
    case Shape::kOutFeatures:
    case Shape::kWidened: last = columns; break;
    case Shape::kPadded: last = padded(last); break;
    case Shape::kTokens: return rank - 1;
    case Shape::kSums: last = padded(last) / kSumWidth; break;
  }
  return rank;
}

hikui_dtype data_type(ElementType type) {
  switch (type) {
    case kInt8: return {0, 8, 1};
    case kInt32: return {0, 32, 1};
    case kInt64: return {0, 64, 1};
    case kUint8: return {1, 8, 1};
    case kFloat16: return {2, 16, 1};
    default: return {2, 32, 1};
  }
}

struct Tensor {
  hikui_tensor view;
  int64_t dims[kMaxRank + 1];  // a look-up's result has one more than its ids

  void describe(void* data, ElementType type, size_t rank) {
    view = {data, {1, 0}, static_cast<int32_t>(rank), data_type(type), dims, nullptr, 0};
  }

  size_t bytes() const {
    size_t total = view.dtype.bits / 8;
    for (int32_t i = 0; i < view.ndim; ++i) total *= static_cast<size_t>(dims[i]);
    return total;
  }
};

// The attribute by which the model says how many columns the output of a product or a look-up has.
bool is_width(int64_t out_features) { return out_features >= 1 && out_features <= kMostColumns; }

bool has_width(Shape rule) { return rule == Shape::kOutFeatures || rule == Shape::kRows; }

constexpr char kNoWidth[] = "hikui: out_features must be a positive number of columns";

int processors = 1;
const Api* registered_api = nullptr;  // for shape inference, which is given none
alignas(64) char absent_data[64];

struct OperatorKernel {
  const Api* api;
  const Spec* spec;
  int64_t out_features;
  float number;
  int64_t rows;
  bool constant[kMaxOperands];
  Tensor fixed[kMaxOperands];
};

// Fills `tensor` from an ONNX Runtime value; null means an optional input that the node leaves out.
Status* view_of(const Api* api, const Spec* spec, size_t index, const Value* value, Tensor* tensor) {
  const ElementType type = spec->input[index].type;
  if (value == nullptr) {
    tensor->dims[0] = 0;
    tensor->describe(absent_data, type, 1);
    return nullptr;
  }
  void* data = nullptr;
  TensorShape* shape = nullptr;
  if (Status* failed = api->tensor_data(value, &data)) return failed;
  if (Status* failed = api->tensor_shape(value, &shape)) return failed;
  size_t rank = 0;
  Status* failed = api->rank(shape, &rank);
  if (failed == nullptr && rank > kMaxRank) {
    failed = api->create_status(kInvalidArgument, "hikui: an operand has more than 8 dimensions");
  }
  if (failed == nullptr) failed = api->dimensions(shape, tensor->dims, rank);
  api->release(shape);
  if (failed == nullptr) tensor->describe(data, type, rank);
  return failed;
}

thread_local const OperatorKernel* running_kernel = nullptr;
thread_local const KernelContext* running_context = nullptr;

struct Launch {
  hikui_parallel_task task;
  void* data;
  int tasks;
  int failed;
};

void run_task(void* data, size_t index) {
  Launch* launch = static_cast<Launch*>(data);
  hikui_parallel_env env = {nullptr, launch->tasks};
  if (launch->task(static_cast<int>(index), &env, launch->data) != 0) {
    __atomic_store_n(&launch->failed, 1, __ATOMIC_RELAXED);
  }
}

// The kernels' parallel regions run on ONNX Runtime's own threads. It does not tell how many there are; the processors
// that this process may use are as many by default.
int launch_on_session_threads(hikui_parallel_task task, void* data, int tasks) {
  if (tasks <= 0) tasks = processors;
  Launch launch = {task, data, tasks, 0};
  const size_t total = static_cast<size_t>(tasks);
  const Api* api = running_kernel->api;
  if (Status* failed = api->parallel_for(running_context, run_task, total, 0, &launch)) {
    api->release(failed);
    return -1;
  }
  return launch.failed ? -1 : 0;
}

hikui_any argument(hikui_tensor* view) {
  hikui_any any = {HIKUI_ANY_DLTENSOR, 0, {}};
  any.value.as_pointer = view;
  return any;
}

Status* compute(void* state, KernelContext* context) {
  OperatorKernel* kernel = static_cast<OperatorKernel*>(state);
  const Api* api = kernel->api;
  const Spec* spec = kernel->spec;
  Tensor given[kMaxOperands], made[kMaxOutputs];
  hikui_any arguments[kMaxOperands + kMaxOutputs + 1];
  int32_t count = 0;

  for (size_t i = 0; i < spec->inputs; ++i) {
    if (kernel->constant[i]) {
      arguments[count++] = argument(&kernel->fixed[i].view);
      continue;
    }
    const Value* value = nullptr;
    if (Status* failed = api->input(context, i, &value)) return failed;
    if (Status* failed = view_of(api, spec, i, value, &given[i])) return failed;
    arguments[count++] = argument(&given[i].view);
  }
  if (spec->number != nullptr) {
    hikui_any number = {spec->number == kRowsAttribute ? HIKUI_ANY_INT : HIKUI_ANY_FLOAT, 0, {}};
    if (spec->number == kRowsAttribute) {
      number.value.as_int = kernel->rows;
    } else {
      number.value.as_float = kernel->number;
    }
    arguments[count++] = number;
  }

  const hikui_tensor* first = static_cast<const hikui_tensor*>(arguments[0].value.as_pointer);
  if (first->ndim == 0) return api->create_status(kInvalidArgument, "hikui: an activation needs at least one dimension");
  for (size_t i = 0; i < spec->outputs; ++i) {
    const Output& output = spec->output[i];
    const bool updated = output.shape == Shape::kUpdated;
    const size_t source = updated ? output.other : 0;
    const hikui_tensor* like = static_cast<const hikui_tensor*>(arguments[source].value.as_pointer);
    int64_t columns = kernel->out_features;
    if (output.shape == Shape::kWidened) {
      const hikui_tensor* other = static_cast<const hikui_tensor*>(arguments[output.other].value.as_pointer);
      if (other->ndim == 0) return api->create_status(kInvalidArgument, "hikui: an operand lacks dimensions");
      columns = other->shape[other->ndim - 1];
    }
    const size_t rank = output_dims(output.shape, columns, like->shape, like->ndim, made[i].dims);
    Value* value = nullptr;
    void* data = nullptr;
    if (Status* failed = api->output(context, i, made[i].dims, rank, &value)) return failed;
    if (Status* failed = api->tensor_data(value, &data)) return failed;
    made[i].describe(data, output.type, rank);
    if (!updated) {
      arguments[count++] = argument(&made[i].view);
      continue;
    }
    if (data != like->data) memcpy(data, like->data, made[i].bytes());
    arguments[output.other] = argument(&made[i].view);
  }

  running_kernel = kernel;
  running_context = context;
  hikui_any result = {};
  const int32_t code = spec->kernel(nullptr, arguments, count, &result);
  return code == 0 ? nullptr : api->create_status(kFail, hikui_kernels_last_error());
}

struct Operator : CustomOp {
  const Spec* spec;
};

const Spec& spec_of(const CustomOp* op) { return *static_cast<const Operator*>(op)->spec; }

Status* create(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) {
  const Spec& spec = spec_of(op);
  auto* kernel = static_cast<OperatorKernel*>(calloc(1, sizeof(OperatorKernel)));
  if (kernel == nullptr) return api->create_status(kFail, "hikui: out of memory");
  kernel->api = api;
  kernel->spec = &spec;
  Status* failed = nullptr;
  if (has_width(spec.output[0].shape)) {
    failed = api->attribute(info, "out_features", &kernel->out_features);
    if (failed == nullptr && !is_width(kernel->out_features)) failed = api->create_status(kInvalidArgument, kNoWidth);
  }
  if (failed == nullptr && spec.number != nullptr) {
    failed = spec.number == kRowsAttribute ? api->attribute(info, spec.number, &kernel->rows)
                                           : api->attribute(info, spec.number, &kernel->number);
  }
  for (size_t i = 0; i < spec.inputs && failed == nullptr; ++i) {
    int constant = 0;
    const Value* value = nullptr;
    failed = api->constant_input(info, i, &constant, &value);
    if (failed != nullptr || constant == 0 || value == nullptr) continue;
    failed = view_of(api, &spec, i, value, &kernel->fixed[i]);
    kernel->constant[i] = true;
  }
  if (failed != nullptr) {
    free(kernel);
    return failed;
  }
  *out = kernel;
  return nullptr;
}

// Writes output shapes where the rank of input 0 is known; a symbolic dimension keeps its name.
Status* infer(const CustomOp* op, ShapeInference* inference) {
  const Spec& spec = spec_of(op);
  const Api* api = registered_api;
  TensorShape* given = nullptr;
  if (Status* failed = api->input_shape(inference, 0, &given)) return failed;
  size_t rank = 0;
  if (Status* failed = api->rank(given, &rank)) return failed;
  if (rank == 0 || rank > kMaxRank) return nullptr;
  int64_t dims[kMaxRank], result[kMaxRank + 1];
  const char* names[kMaxRank];
  if (Status* failed = api->dimensions(given, dims, rank)) return failed;
  if (Status* failed = api->symbolic(given, names, rank)) return failed;
  int64_t out_features = 0;
  if (has_width(spec.output[0].shape)) {
    const Attribute* attribute = nullptr;
    size_t needed = 0;
    if (Status* failed = api->attribute(inference, "out_features", &attribute)) return failed;
    if (Status* failed = api->read(attribute, kIntAttribute, &out_features, sizeof(out_features), &needed)) return failed;
    if (!is_width(out_features)) return api->create_status(kInvalidArgument, kNoWidth);
  }
  if (dims[rank - 1] > kMostColumns) return api->create_status(kInvalidArgument, "hikui: an operand has too many columns");
  for (size_t i = 0; i < spec.outputs; ++i) {
    const Output& output = spec.output[i];
    if (output.shape == Shape::kUpdated) {
      TensorShape* old = nullptr;
      if (Status* failed = api->input_shape(inference, output.other, &old)) return failed;
      if (Status* failed = api->set_output_shape(inference, i, old)) return failed;
      continue;
    }
    if (dims[rank - 1] < 0 && (output.shape == Shape::kPadded || output.shape == Shape::kSums)) continue;
    int64_t columns = out_features;
    if (output.shape == Shape::kWidened) {
      TensorShape* other = nullptr;
      int64_t sizes[kMaxRank];
      size_t other_rank = 0;
      if (Status* failed = api->input_shape(inference, output.other, &other)) return failed;
      if (Status* failed = api->rank(other, &other_rank)) return failed;
      if (other_rank == 0 || other_rank > kMaxRank) continue;
      if (Status* failed = api->dimensions(other, sizes, other_rank)) return failed;
      if (sizes[other_rank - 1] < 0) continue;
      columns = sizes[other_rank - 1];
    }
    const size_t count = output_dims(output.shape, columns, dims, rank, result);
    const char* kept[kMaxRank + 1];
    for (size_t d = 0; d < count; ++d) kept[d] = result[d] < 0 ? names[d] : "";
    TensorShape* shape = nullptr;
    if (Status* failed = api->create_shape(&shape)) return failed;
    Status* failed = api->set_element_type(shape, output.type);
    if (failed == nullptr) failed = api->set_dimensions(shape, result, count);
    if (failed == nullptr) failed = api->set_symbolic(shape, kept, count);
    if (failed == nullptr) failed = api->set_output_shape(inference, i, shape);
    api->release(shape);
    if (failed != nullptr) return failed;
  }
  return nullptr;
}

void fill(Operator* op, const Spec* spec) {
  memset(static_cast<void*>(op), 0, sizeof(*op));
  op->spec = spec;
  op->version = kApiFloor;
  op->name = [](const CustomOp* self) { return spec_of(self).name; };
  op->provider = [](const CustomOp*) -> const char* { return nullptr; };
  op->input_type = [](const CustomOp* self, size_t i) { return spec_of(self).input[i].type; };
  op->input_count = [](const CustomOp* self) { return spec_of(self).inputs; };
  op->output_type = [](const CustomOp* self, size_t i) { return spec_of(self).output[i].type; };
  op->output_count = [](const CustomOp* self) { return spec_of(self).outputs; };
  op->destroy = free;
  op->input_presence = [](const CustomOp* self, size_t i) { return spec_of(self).input[i].presence; };
  op->output_presence = [](const CustomOp*, size_t) { return kRequired; };
  op->input_memory = [](const CustomOp*, size_t) -> int32_t { return 0; };
  op->variadic_input_minimum = [](const CustomOp*) { return 1; };
  op->variadic_input_homogeneous = [](const CustomOp*) { return 1; };
  op->variadic_output_minimum = [](const CustomOp*) { return 1; };
  op->variadic_output_homogeneous = [](const CustomOp*) { return 1; };
  op->create_v2 = create;
  op->compute_v2 = compute;
  op->infer_shape = infer;
  op->start_version = [](const CustomOp*) { return 1; };
  op->end_version = [](const CustomOp*) { return INT32_MAX; };
  op->may_in_place = [](int**, int**) -> size_t { return 0; };
  op->release_may_in_place = [](int*, int*) {};
  op->alias_map = [](int**, int**) -> size_t { return 0; };
  op->release_alias_map = [](int*, int*) {};
}

Operator operators[kOperators + 1];

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(
    SessionOptions* options, const ApiBase* base) {
  const Api* api = base->get_api(kApiFloor);
  if (api == nullptr) return nullptr;  // ONNX Runtime has said that it is too old, and will miss the operators
  registered_api = api;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) processors = CPU_COUNT(&allowed);
  hikui_kernels_set_launch(launch_on_session_threads);
  hikui_kernels_set_error([](const char*) {});  // the sentence goes into the status, not to a TVM in the same process
  Domain* domain = nullptr;  // lives as long as the process, as sessions keep pointing at it
  if (Status* failed = api->create_domain("hikui", &domain)) return failed;
  for (size_t i = 0; i < kOperators; ++i) {
    if (operators[i].spec == nullptr) fill(&operators[i], &kSpecs[i]);
    if (Status* failed = api->domain_add(domain, &operators[i])) return failed;
  }
  return api->add_domain(options, domain);
}
