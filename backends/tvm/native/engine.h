// The model: TVM's virtual machine, the mapped weights and the caches, through TVM's C interface.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include "index.h"
#include "support.h"

namespace hikui {

// A value of TVM's that is given up at the end of its scope.
class Value {
 public:
  Value() { memset(&any_, 0, sizeof(any_)); }
  Value(const Value&) = delete;
  Value& operator=(const Value&) = delete;
  ~Value() { Release(); }

  // Where a function of TVM's writes its result.
  TVMFFIAny* Out() {
    Release();
    return &any_;
  }
  void Hold(TVMFFIObjectHandle object, int32_t type) {
    Release();
    any_.type_index = type;
    any_.v_obj = static_cast<TVMFFIObject*>(object);
  }
  const TVMFFIAny& any() const { return any_; }
  TVMFFIObjectHandle object() const { return any_.v_obj; }

 private:
  void Release() {
    if (any_.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(any_.v_obj);
    memset(&any_, 0, sizeof(any_));
  }
  TVMFFIAny any_;
};

inline TVMFFIAny Text(const char* text) {
  TVMFFIAny any;
  memset(&any, 0, sizeof(any));
  any.type_index = kTVMFFIRawStr;
  any.v_c_str = text;
  return any;
}

inline TVMFFIAny Integer(int64_t number) {
  TVMFFIAny any;
  memset(&any, 0, sizeof(any));
  any.type_index = kTVMFFIInt;
  any.v_int64 = number;
  return any;
}

// Ends the program with what TVM says went wrong.
[[noreturn]] inline void StopForTvm(const char* doing) {
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  if (error == nullptr) Stop(kFailure, "%s failed", doing);
  TVMFFIByteArray message = TVMFFIErrorGetCellPtr(error)->message;
  size_t length = 0;
  while (length < message.size && message.data[length] != '\n') ++length;
  Stop(kFailure, "%s failed: %.*s", doing, static_cast<int>(length), message.data);
}

inline void Call(const char* doing, TVMFFIObjectHandle function, TVMFFIAny* arguments, size_t count, Value* result) {
  if (TVMFFIFunctionCall(function, arguments, static_cast<int32_t>(count), result->Out()) != 0) StopForTvm(doing);
}

inline void CallGlobal(const char* doing, const char* name, TVMFFIAny* arguments, size_t count, Value* result) {
  TVMFFIByteArray text = {name, strlen(name)};
  TVMFFIObjectHandle function = nullptr;
  if (TVMFFIFunctionGetGlobal(&text, &function) != 0) StopForTvm(doing);
  if (function == nullptr) Stop(kFailure, "TVM's runtime library has no function %s", name);
  Value held;
  held.Hold(function, kTVMFFIFunction);
  Call(doing, function, arguments, count, result);
}

inline void GetFunction(const Value& module, const char* name, Value* function) {
  TVMFFIAny arguments[] = {module.any(), Text(name), Integer(1)};
  arguments[2].type_index = kTVMFFIBool;
  CallGlobal(name, "ffi.ModuleGetFunction", arguments, 3, function);
  if (function->any().type_index != kTVMFFIFunction) Stop(kFailure, "the model's library has no function %s", name);
}

inline bool DataType(const char* name, DLDataType* type) {
  struct Entry {
    const char* name;
    DLDataType type;
  };
  static const Entry kTypes[] = {
      {"float32", {kDLFloat, 32, 1}}, {"float16", {kDLFloat, 16, 1}}, {"int8", {kDLInt, 8, 1}}, {"uint8", {kDLUInt, 8, 1}},
      {"int32", {kDLInt, 32, 1}},     {"int64", {kDLInt, 64, 1}},     {"bool", {kDLBool, 8, 1}},
  };
  for (const Entry& entry : kTypes) {
    if (strcmp(entry.name, name) == 0) {
      *type = entry.type;
      return true;
    }
  }
  return false;
}

// Wraps memory that outlives the tensor.
inline void WrapTensor(const void* data, DLDataType type, const int64_t* shape, int64_t rank, Value* tensor) {
  struct Managed {
    DLManagedTensor tensor;
    int64_t shape[kMaxRank];
    int64_t strides[kMaxRank];
  };
  Managed* managed = static_cast<Managed*>(calloc(1, sizeof(Managed)));
  if (managed == nullptr) Stop(kFailure, "out of memory");
  int64_t stride = 1;
  for (int64_t axis = rank - 1; axis >= 0; --axis) {
    managed->shape[axis] = shape[axis];
    managed->strides[axis] = stride;
    stride *= shape[axis];
  }
  DLTensor& view = managed->tensor.dl_tensor;
  view.data = const_cast<void*>(data);
  view.device = {kDLCPU, 0};
  view.ndim = static_cast<int>(rank);
  view.dtype = type;
  view.shape = managed->shape;
  view.strides = managed->strides;
  managed->tensor.manager_ctx = managed;
  managed->tensor.deleter = [](DLManagedTensor* self) { free(self->manager_ctx); };
  TVMFFIObjectHandle handle = nullptr;
  if (TVMFFITensorFromDLPack(&managed->tensor, 0, 0, &handle) != 0) StopForTvm("wrapping a tensor");
  tensor->Hold(handle, kTVMFFITensor);
}

class Engine {
 public:
  // The CPU must have been checked before: loading the library may already run its instructions.
  void Load(const char* directory, const Index& index) {
    index_ = &index;
    Path parameters(directory, "model.params");
    weights_file_.Require(parameters.c_str());
    if (weights_file_.size != static_cast<uint64_t>(index.parameters)) {
      Stop(kFailure, "%s has %zu bytes, but model.index says %lld; copy the artefact again", parameters.c_str(),
           weights_file_.size, static_cast<long long>(index.parameters));
    }
    MapWeights();
    NewCaches();
    Path library(directory, "model.so");
    Value module, load, machine, initialise, ignored;
    TVMFFIAny file = Text(library.c_str());
    CallGlobal("loading the model's library", "ffi.ModuleLoadFromFile", &file, 1, &module);
    GetFunction(module, "vm_load_executable", &load);
    Call("loading the program", load.object(), nullptr, 0, &machine);
    GetFunction(machine, "vm_initialization", &initialise);
    constexpr int64_t kPooledAllocator = 2;
    TVMFFIAny device[] = {Integer(kDLCPU), Integer(0), Integer(kPooledAllocator)};
    Call("starting the virtual machine", initialise.object(), device, 3, &ignored);
    GetFunction(machine, "main", &main_);
  }

  // Runs tokens after the `past` ones in the cache. The logits, [count, vocabulary], stay valid until the next step. The
  // embedding clips its ids, so that tokens which only a wrong index lets through come as far as its contradiction below.
  const float* Step(const int64_t* tokens, int64_t count, int64_t past) {
    for (int64_t at = 0; at < count; ++at) {
      if (tokens[at] < 0 || tokens[at] >= index_->vocabulary) {
        Stop(kFailure, "token %lld is not in the vocabulary of %lld", static_cast<long long>(tokens[at]),
             static_cast<long long>(index_->vocabulary));
      }
    }
    Value tokens_tensor, past_tensor;
    DLDataType int64 = {kDLInt, 64, 1};
    int64_t tokens_shape[] = {1, count}, past_shape[] = {1};
    // Compiled code may load its arguments as what begins at 64 bytes, and a part of a prompt need not.
    constexpr size_t kAligned = 64 / sizeof(int64_t);
    arguments_held_.Zeros(static_cast<size_t>(count) + 2 * kAligned);
    int64_t* held = arguments_held_.data();
    held += (64 - reinterpret_cast<uintptr_t>(held) % 64) % 64 / sizeof(int64_t);
    held[0] = past;
    memcpy(held + kAligned, tokens, static_cast<size_t>(count) * sizeof(int64_t));
    WrapTensor(held + kAligned, int64, tokens_shape, 2, &tokens_tensor);
    WrapTensor(held, int64, past_shape, 1, &past_tensor);
    arguments_[0] = tokens_tensor.any();
    arguments_[1] = past_tensor.any();
    Call("running the model", main_.object(), arguments_.data(), arguments_.size(), &logits_);
    if (logits_.any().type_index != kTVMFFITensor) Stop(kFailure, "the model's library gives something that is no tensor");
    const DLTensor* logits = TVMFFITensorGetDLTensorPtr(logits_.object());
    CheckLogits(*logits, count);
    return reinterpret_cast<const float*>(static_cast<const char*>(logits->data) + logits->byte_offset);
  }

 private:
  // That the library computes what the index says: whoever reads the logits takes their size from the index.
  void CheckLogits(const DLTensor& logits, int64_t count) const {
    const bool floats = logits.device.device_type == kDLCPU && logits.dtype.code == kDLFloat && logits.dtype.bits == 32 &&
                        logits.dtype.lanes == 1;
    if (!floats || logits.ndim != 3 || logits.shape[0] != 1) {
      Stop(kFailure, "the model's library gives something that is no logits; copy the artefact again");
    }
    if (logits.shape[1] != count || logits.shape[2] != index_->vocabulary) {
      Stop(kFailure, "the model gives %lld×%lld logits for %lld tokens, but model.index says a vocabulary of %lld; copy the "
           "artefact again", static_cast<long long>(logits.shape[1]), static_cast<long long>(logits.shape[2]),
           static_cast<long long>(count), static_cast<long long>(index_->vocabulary));
    }
    const int64_t* strides = logits.strides;
    if (strides != nullptr && (strides[2] != 1 || (count > 1 && strides[1] != index_->vocabulary))) {
      Stop(kFailure, "the model's library gives logits that do not follow each other; copy the artefact again");
    }
  }

  // The index has been checked: every tensor lies inside the file.
  void MapWeights() {
    Array<TVMFFIAny> tensors;
    for (const Weight& weight : index_->weights) {
      DLDataType type;
      if (!DataType(weight.dtype, &type)) Stop(kFailure, "model.index names the unknown type %s", weight.dtype);
      Value tensor;
      WrapTensor(weights_file_.data + weight.offset, type, weight.shape, weight.rank, &tensor);
      TVMFFIObjectIncRef(tensor.object());
      tensors.Add(tensor.any());
    }
    CallGlobal("collecting the weights", "ffi.Array", tensors.data(), tensors.size(), &weights_);
    for (const TVMFFIAny& tensor : tensors) TVMFFIObjectDecRef(tensor.v_obj);
  }

  // Of each layer keys and values; where they are quantised, codes first and then their scales, a half a token and head.
  void NewCaches() {
    arguments_.Add(Integer(0));
    arguments_.Add(Integer(0));
    for (const CacheShape& cache : index_->caches) {
      const bool bytes = strcmp(cache.format, "int8") == 0, nibbles = strcmp(cache.format, "int4") == 0;
      const DLDataType stored = bytes     ? DLDataType{kDLInt, 8, 1}
                                : nibbles ? DLDataType{kDLUInt, 8, 1}
                                          : DLDataType{kDLFloat, 32, 1};
      const int64_t shape[] = {1, cache.heads, index_->context, nibbles ? cache.head_size / 2 : cache.head_size};
      for (int side = 0; side < 2; ++side) NewCache(stored, shape, 4);
      for (int side = 0; side < 2 && (bytes || nibbles); ++side) NewCache({kDLFloat, 16, 1}, shape, 3);
    }
    arguments_.Add(weights_.any());
  }

  void NewCache(DLDataType type, const int64_t* shape, int rank) {
    size_t bytes = type.bits / 8;
    for (int axis = 0; axis < rank; ++axis) bytes *= static_cast<size_t>(shape[axis]);
    // Pages of the cache take memory only once tokens reach them.
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) Stop(kFailure, "no memory for a cache of %zu bytes", bytes);
    Value tensor;
    WrapTensor(data, type, shape, rank, &tensor);
    TVMFFIObjectIncRef(tensor.object());
    arguments_.Add(tensor.any());
  }

  const Index* index_ = nullptr;
  Array<int64_t> arguments_held_;
  MappedFile weights_file_;
  Value weights_, main_, logits_;
  Array<TVMFFIAny> arguments_;  // tokens, past, the caches, the weights
};

}  // namespace hikui
