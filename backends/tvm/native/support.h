// What the runner needs of a library: errors, growable arrays and mapped files, without the C++ standard library, so that
// the program asks the board for nothing but glibc beside TVM's runtime.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace hikui {

constexpr int kFailure = 1;
constexpr int kUsage = 2;

// How `Stop` leaves; what drives these headers by itself, such as a fuzz target, comes back instead.
#ifndef HIKUI_LEAVE
#define HIKUI_LEAVE(code) _exit(code)
#endif

// Ends the program with one sentence.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void Stop(int code, const char* format, ...) {
  fflush(stdout);
  fputs("hikui-run: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  HIKUI_LEAVE(code);
}

// A growable array of plain values.
template <typename T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { free(data_); }

  void Add(const T& value) {
    if (size_ == capacity_) Grow(capacity_ == 0 ? 16 : 2 * capacity_);
    data_[size_++] = value;
  }
  // So many values, all zero.
  void Zeros(size_t count) {
    if (count > capacity_) Grow(count);
    if (count > 0) memset(static_cast<void*>(data_), 0, count * sizeof(T));
    size_ = count;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t at) { return data_[at]; }
  const T& operator[](size_t at) const { return data_[at]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  void Grow(size_t capacity) {
    void* grown = reallocarray(static_cast<void*>(data_), capacity, sizeof(T));
    if (grown == nullptr) Stop(kFailure, "out of memory");
    data_ = static_cast<T*>(grown);
    capacity_ = capacity;
  }
  T* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

// The path of a file in the artefact.
class Path {
 public:
  Path(const char* directory, const char* name) {
    int length = snprintf(text_, sizeof(text_), "%s/%s", directory, name);
    if (length < 0 || static_cast<size_t>(length) >= sizeof(text_)) Stop(kFailure, "the path %s is too long", directory);
  }
  const char* c_str() const { return text_; }

 private:
  char text_[4096];
};

// A whole number as files and options write it: digits alone, no zero ahead, at most `most`.
inline bool ReadNumber(const char* text, size_t size, int64_t most, int64_t* number) {
  if (size == 0 || (size > 1 && text[0] == '0')) return false;
  int64_t value = 0;
  for (size_t at = 0; at < size; ++at) {
    if (text[at] < '0' || text[at] > '9' || __builtin_mul_overflow(value, int64_t{10}, &value) ||
        __builtin_add_overflow(value, int64_t{text[at] - '0'}, &value) || value > most) {
      return false;
    }
  }
  *number = value;
  return true;
}

// A file mapped read-only. The mapping lives as long as the program.
struct MappedFile {
  const char* data = nullptr;
  size_t size = 0;

  // False where there is no such file; any other trouble ends the program.
  bool Open(const char* path) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
      if (errno == ENOENT) return false;
      Stop(kFailure, "%s cannot be read: %s", path, strerror(errno));
    }
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) Stop(kFailure, "%s is not a file", path);
    size = static_cast<size_t>(status.st_size);
    if (size > 0) {
      void* mapping = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
      if (mapping == MAP_FAILED) Stop(kFailure, "%s cannot be mapped: %s", path, strerror(errno));
      data = static_cast<const char*>(mapping);
    }
    close(file);
    return true;
  }

  void Require(const char* path) {
    if (!Open(path)) Stop(kFailure, "%s is missing; copy the artefact again", path);
  }
};

}  // namespace hikui
