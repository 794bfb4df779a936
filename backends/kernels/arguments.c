/* See arguments.h. */
#include "arguments.h"

#include <inttypes.h>

static const struct {
  const char* name;
  uint8_t code, bits, alignment;
} elements[] = {{"int8", 0, 8, 1},   {"int8", 0, 8, 4},     {"uint8", 1, 8, 4},    {"uint8", 1, 8, 1},
                {"int32", 0, 32, 4}, {"int64", 0, 64, 8}, {"float16", 2, 16, 2}, {"float32", 2, 32, 4}};

/* Beyond what any machine can address, and small enough to be added to and multiplied a little. */
static const int64_t most_elements = INT64_C(1) << 58;

int hikui_begin(struct call* call, const char* name, const hikui_any* args, int32_t given, int32_t wanted) {
  call->name = name;
  call->args = args;
  call->failed = 0;
  if (given == wanted) return 0;
  return hikui_fail("%s takes %d arguments, not %d.", name, (int)wanted, (int)given);
}

struct view hikui_take_tensor(struct call* call, int index, const char* name, enum element element) {
  struct view view = {name, NULL, 0, NULL, 1, 1, 1};
  const hikui_any* any = &call->args[index];
  const hikui_tensor* given;
  if (call->failed) return view;
  if (any->type_index == HIKUI_ANY_DLTENSOR) {
    given = any->value.as_pointer;
  } else if (any->type_index == HIKUI_ANY_TENSOR) {
    given = (const hikui_tensor*)((const char*)any->value.as_pointer + HIKUI_OBJECT_HEADER);
  } else {
    call->failed = hikui_fail("%s: argument %d, %s, must be a tensor.", call->name, index, name);
    return view;
  }
  if (given == NULL || given->ndim < 0 || (given->ndim > 0 && given->shape == NULL)) {
    call->failed = hikui_fail("%s: argument %d, %s, must be a tensor.", call->name, index, name);
    return view;
  }
  int64_t extent = 1;
  for (int32_t i = 0; i < given->ndim; ++i) {
    const int64_t size = given->shape[i];
    extent = hikui_product(extent, size > 1 ? size : 1);
    if (size < 0 || extent > most_elements) {
      call->failed = hikui_fail("%s: %s has a size of %" PRId64 ", and no tensor is so large or less than empty.",
                                call->name, name, size);
      return view;
    }
  }
  view.ndim = given->ndim;
  view.shape = given->shape;
  for (int32_t i = 0; i < given->ndim; ++i) {
    view.count *= given->shape[i];
    if (i + 1 < given->ndim) view.rows *= given->shape[i];
  }
  if (given->ndim > 0) view.columns = given->shape[given->ndim - 1];
  view.data = (char*)given->data + given->byte_offset;
  if (given->device.device_type != 1) {
    call->failed = hikui_fail("%s: %s must be on the CPU.", call->name, name);
  } else if (given->dtype.code != elements[element].code || given->dtype.bits != elements[element].bits ||
             given->dtype.lanes != 1) {
    call->failed = hikui_fail("%s: %s must be %s.", call->name, name, elements[element].name);
  } else if (given->data == NULL && view.count > 0) {
    call->failed = hikui_fail("%s: %s has no data.", call->name, name);
  } else if (view.count > 0 && (uintptr_t)view.data % elements[element].alignment != 0) {
    call->failed = hikui_fail("%s: %s must lie at a multiple of %d bytes.", call->name, name,
                              (int)elements[element].alignment);
  } else if (given->strides != NULL) {
    int64_t expected = 1;
    for (int32_t i = given->ndim; i-- > 0;) {
      if (given->shape[i] != 1 && view.count > 0 && given->strides[i] != expected) {
        call->failed = hikui_fail("%s: %s must be contiguous.", call->name, name);
        break;
      }
      expected = hikui_product(expected, given->shape[i]);
    }
  }
  return view;
}

double hikui_take_number(struct call* call, int index, const char* name) {
  const hikui_any* any = &call->args[index];
  if (any->type_index == HIKUI_ANY_FLOAT) return any->value.as_float;
  if (any->type_index == HIKUI_ANY_INT) return (double)any->value.as_int;
  if (!call->failed) call->failed = hikui_fail("%s: argument %d, %s, must be a number.", call->name, index, name);
  return 0;
}

void hikui_expect_count(struct call* call, const struct view* view, int64_t count) {
  if (call->failed || view->count == count) return;
  call->failed = hikui_fail("%s: %s has %" PRId64 " elements where %" PRId64 " fit the other arguments.", call->name,
                            view->name, view->count, count);
}

void hikui_expect_matrix(struct call* call, const struct view* view, int64_t rows, int64_t columns) {
  if (call->failed || (view->ndim > 0 && view->rows == rows && view->columns == columns)) return;
  call->failed = hikui_fail("%s: %s is %" PRId64 " rows of %" PRId64 " where %" PRId64 " of %" PRId64
                            " fit the other arguments.",
                            call->name, view->name, view->rows, view->columns, rows, columns);
}

void hikui_expect_packed(struct call* call, const struct view* view, int64_t blocks, int32_t ndim) {
  if (call->failed) return;
  if (view->ndim == ndim && view->shape[0] == blocks && view->shape[2] == 16 && (ndim == 3 || view->shape[3] == 4))
    return;
  call->failed = hikui_fail("%s: %s must be packed as [%" PRId64 ", *, 16%s] to fit the other arguments.", call->name,
                            view->name, blocks, ndim == 3 ? "" : ", 4");
}

void hikui_expect_bias(struct call* call, const struct view* view, int64_t n) {
  if (call->failed || view->count == 0 || (view->ndim == 1 && view->count == n)) return;
  call->failed = hikui_fail("%s: %s has %" PRId64 " elements where %" PRId64 " or 0 fit the other arguments.",
                            call->name, view->name, view->count, n);
}

void hikui_expect_heads(struct call* call, const struct view* view, int64_t heads, int64_t rows, int64_t size) {
  if (call->failed) return;
  const int64_t* shape = view->shape;
  if (view->ndim == 4 && shape[0] == 1 && shape[1] == heads && shape[2] == rows && shape[3] == size) return;
  call->failed = hikui_fail("%s: %s must be [1, %" PRId64 ", %" PRId64 ", %" PRId64 "] to fit the other arguments.",
                            call->name, view->name, heads, rows, size);
}
