// The part of ONNX Runtime's C interface that a custom-operator library needs, declared in our own words.
//
// ONNX Runtime hands its interface over at registration as a table of function pointers whose order never changes, so
// a library built against this file links against nothing and runs with every version from API 18 (ONNX Runtime 1.18)
// on. `Slot` names the places of the table that are used; tests run every one of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiFloor = 18;

struct Status;             // null is success
struct Value;              // a tensor
struct TensorShape;        // element type and dimensions
struct KernelInfo;         // a node's attributes and constant inputs
struct KernelContext;      // a node's run
struct ShapeInference;     // a node's shape inference
struct Attribute;          // an attribute as shape inference sees it
struct Domain;             // a namespace of operators
struct SessionOptions;

enum ElementType : int32_t { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum Presence : int32_t { kRequired = 0, kOptional = 1 };
enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };
enum AttributeKind : int32_t { kIntAttribute = 1 };

enum Slot : size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kCreateTensorShape = 57,
  kSetElementType = 58,
  kSetDimensions = 59,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetSymbolicDimensions = 63,
  kGetTensorShape = 65,
  kKernelAttributeFloat = 85,
  kKernelAttributeInt64 = 86,
  kContextInput = 90,
  kContextOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorShape = 99,
  kKernelConstantInput = 249,
  kInferenceInputShape = 268,
  kInferenceAttribute = 269,
  kInferenceSetOutputShape = 270,
  kSetSymbolicDimensions = 271,
  kReadAttribute = 272,
  kParallelFor = 274,
};

// The table itself; `call` picks a slot under the type it is known to have.
class Api {
 public:
  Status* create_status(ErrorCode code, const char* text) const {
    return as<Status* (*)(ErrorCode, const char*)>(kCreateStatus)(code, text);
  }
  void release(Status* status) const { as<void (*)(Status*)>(kReleaseStatus)(status); }
  void release(TensorShape* shape) const { as<void (*)(TensorShape*)>(kReleaseTensorShape)(shape); }

  Status* create_domain(const char* name, Domain** out) const {
    return as<Status* (*)(const char*, Domain**)>(kCreateCustomOpDomain)(name, out);
  }
  Status* domain_add(Domain* domain, const struct CustomOp* op) const {
    return as<Status* (*)(Domain*, const CustomOp*)>(kCustomOpDomainAdd)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return as<Status* (*)(SessionOptions*, Domain*)>(kAddCustomOpDomain)(options, domain);
  }

  Status* tensor_data(const Value* value, void** out) const {
    return as<Status* (*)(const Value*, void**)>(kGetTensorMutableData)(value, out);
  }
  Status* tensor_shape(const Value* value, TensorShape** out) const {
    return as<Status* (*)(const Value*, TensorShape**)>(kGetTensorShape)(value, out);
  }
  Status* create_shape(TensorShape** out) const {
    return as<Status* (*)(TensorShape**)>(kCreateTensorShape)(out);
  }
  Status* set_element_type(TensorShape* shape, ElementType type) const {
    return as<Status* (*)(TensorShape*, ElementType)>(kSetElementType)(shape, type);
  }
  Status* set_dimensions(TensorShape* shape, const int64_t* dims, size_t count) const {
    return as<Status* (*)(TensorShape*, const int64_t*, size_t)>(kSetDimensions)(shape, dims, count);
  }
  Status* set_symbolic(TensorShape* shape, const char** names, size_t count) const {
    return as<Status* (*)(TensorShape*, const char**, size_t)>(kSetSymbolicDimensions)(shape, names, count);
  }
  Status* rank(const TensorShape* shape, size_t* out) const {
    return as<Status* (*)(const TensorShape*, size_t*)>(kGetDimensionsCount)(shape, out);
  }
  Status* dimensions(const TensorShape* shape, int64_t* out, size_t count) const {
    return as<Status* (*)(const TensorShape*, int64_t*, size_t)>(kGetDimensions)(shape, out, count);
  }
  Status* symbolic(const TensorShape* shape, const char** out, size_t count) const {
    return as<Status* (*)(const TensorShape*, const char**, size_t)>(kGetSymbolicDimensions)(shape, out, count);
  }

  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return as<Status* (*)(const KernelInfo*, const char*, float*)>(kKernelAttributeFloat)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return as<Status* (*)(const KernelInfo*, const char*, int64_t*)>(kKernelAttributeInt64)(info, name, out);
  }
  Status* constant_input(const KernelInfo* info, size_t index, int* constant, const Value** out) const {
    return as<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(kKernelConstantInput)(
        info, index, constant, out);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return as<Status* (*)(const KernelContext*, size_t, const Value**)>(kContextInput)(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return as<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(kContextOutput)(
        context, index, dims, rank, out);
  }
  Status* parallel_for(
      const KernelContext* context, void (*task)(void*, size_t), size_t total, size_t batches, void* data) const {
    return as<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(kParallelFor)(
        context, task, total, batches, data);
  }

  Status* input_shape(const ShapeInference* inference, size_t index, TensorShape** out) const {
    return as<Status* (*)(const ShapeInference*, size_t, TensorShape**)>(kInferenceInputShape)(inference, index, out);
  }
  Status* set_output_shape(const ShapeInference* inference, size_t index, const TensorShape* shape) const {
    return as<Status* (*)(const ShapeInference*, size_t, const TensorShape*)>(kInferenceSetOutputShape)(
        inference, index, shape);
  }
  Status* attribute(const ShapeInference* inference, const char* name, const Attribute** out) const {
    return as<Status* (*)(const ShapeInference*, const char*, const Attribute**)>(kInferenceAttribute)(
        inference, name, out);
  }
  Status* read(const Attribute* attribute, AttributeKind kind, void* data, size_t size, size_t* needed) const {
    return as<Status* (*)(const Attribute*, AttributeKind, void*, size_t, size_t*)>(kReadAttribute)(
        attribute, kind, data, size, needed);
  }

 private:
  template <class Function>
  Function as(Slot slot) const {
    return reinterpret_cast<Function>(slots_[slot]);
  }
  void* slots_[kParallelFor + 1];
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version)();
};

// What ONNX Runtime asks of an operator. The order is fixed; fields that the declared version does not reach are unread.
struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  Presence (*input_presence)(const CustomOp*, size_t);
  Presence (*output_presence)(const CustomOp*, size_t);
  int32_t (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, ShapeInference*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_in_place)(int**, int**);
  void (*release_may_in_place)(int*, int*);
  size_t (*alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};

}  // namespace ort
