// model.tokens: the bytes of each token; and text as JSON.
#pragma once

#include "support.h"

namespace hikui {

class TokenTexts {
 public:
  // A model without a tokenizer has no such file; its tokens then print as nothing.
  void Open(const char* path, int64_t vocabulary) {
    MappedFile file;
    if (file.Open(path)) Parse(path, file.data, file.size, vocabulary);
  }

  // Takes the bytes of `path`, which must outlive this.
  void Parse(const char* path, const char* data, size_t size, int64_t vocabulary) {
    if (size < 12 || memcmp(data, "HKTK", 4) != 0) Stop(kFailure, "%s is damaged; copy the artefact again", path);
    data_ = data;
    memcpy(&count_, data + 4, 4);
    uint64_t bytes = 8 + 4 * (static_cast<uint64_t>(count_) + 1);
    if (bytes > size || bytes + Offset(count_) != size) Stop(kFailure, "%s is cut short; copy the artefact again", path);
    if (count_ != vocabulary) {
      Stop(kFailure, "%s has %u tokens, but model.index says a vocabulary of %lld; copy the artefact again", path, count_,
           static_cast<long long>(vocabulary));
    }
    if (Offset(0) != 0) Stop(kFailure, "%s is damaged; copy the artefact again", path);
    for (uint32_t token = 0; token < count_; ++token) {
      if (Offset(token) > Offset(token + 1)) Stop(kFailure, "%s is damaged; copy the artefact again", path);
    }
    bytes_ = data + bytes;
  }
  bool present() const { return bytes_ != nullptr; }

  void Append(int64_t token, Array<char>* text) const {
    if (token < 0 || token >= static_cast<int64_t>(count_)) return;
    for (uint32_t at = Offset(token); at < Offset(token + 1); ++at) text->Add(bytes_[at]);
  }

 private:
  uint32_t Offset(int64_t token) const {
    uint32_t offset;
    memcpy(&offset, data_ + 8 + 4 * token, 4);
    return offset;
  }
  const char* data_ = nullptr;
  uint32_t count_ = 0;
  const char* bytes_ = nullptr;
};

// The length of the UTF-8 character at the front, 0 where the bytes are none.
inline size_t CharacterLength(const char* text, size_t size) {
  unsigned char lead = static_cast<unsigned char>(text[0]);
  size_t length = lead < 0x80 ? 1 : lead >= 0xC2 && lead < 0xE0 ? 2 : lead >= 0xE0 && lead < 0xF0 ? 3 : lead >= 0xF0 && lead < 0xF5 ? 4 : 0;
  if (length > size) return 0;
  for (size_t at = 1; at < length; ++at) {
    if ((static_cast<unsigned char>(text[at]) & 0xC0) != 0x80) return 0;
  }
  return length;
}

// Prints a JSON string; bytes that are not UTF-8 become the replacement character.
inline void PrintJson(const Array<char>& text) {
  putchar('"');
  for (size_t at = 0; at < text.size();) {
    size_t length = CharacterLength(text.data() + at, text.size() - at);
    unsigned char byte = static_cast<unsigned char>(text[at]);
    if (length == 0) {
      fputs("\\ufffd", stdout);
    } else if (byte == '"' || byte == '\\') {
      printf("\\%c", byte);
    } else if (byte < 0x20) {
      printf("\\u%04x", byte);
    } else {
      fwrite(text.data() + at, 1, length, stdout);
    }
    at += length == 0 ? 1 : length;
  }
  putchar('"');
}

}  // namespace hikui
