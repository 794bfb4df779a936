// model.index: what the model is and where its weights lie. backends/tvm/index.py describes the lines.
//
// Nothing in the file is believed that another part of it can contradict: each line has exactly its words, each number its
// bounds, a tensor the bytes of its shape, and all tensors their place in model.params, in order and apart.
#pragma once

#include "support.h"

namespace hikui {

constexpr int64_t kMaxRank = 8;
constexpr int64_t kMaxTokens = INT32_MAX;              // of a context or a vocabulary
constexpr int64_t kMaxSize = int64_t{1} << 40;         // of a dimension
constexpr int64_t kMaxBytes = int64_t{1} << 47;        // of a file or a cache: what an address space holds
constexpr size_t kMaxIndexBytes = size_t{64} << 20;    // some 500,000 tensors

#if defined(__aarch64__)
constexpr char kTriple[] = "aarch64-linux-gnu";
#elif defined(__x86_64__)
constexpr char kTriple[] = "x86_64-linux-gnu";
#endif

struct CacheShape {
  int64_t heads;
  int64_t head_size;
  const char* format;  // float32, int8 or int4
};

struct Weight {
  const char* dtype;
  int64_t offset;
  int64_t bytes;
  int64_t rank;
  int64_t shape[kMaxRank];
};

struct FeatureName {
  char text[32];
};

// The words of a line, which single spaces separate.
class Words {
 public:
  Words(const char* text, size_t size) : text_(text), left_(size), more_(true) {}

  // False where no word is left.
  bool Next(const char** word, size_t* size) {
    if (!more_) return false;
    const char* space = left_ == 0 ? nullptr : static_cast<const char*>(memchr(text_, ' ', left_));
    *word = text_;
    *size = space == nullptr ? left_ : static_cast<size_t>(space - text_);
    more_ = space != nullptr;
    if (more_) {
      text_ += *size + 1;
      left_ -= *size + 1;
    }
    return *size > 0;
  }
  bool Number(int64_t least, int64_t most, int64_t* number) {
    const char* word;
    size_t size;
    return Next(&word, &size) && ReadNumber(word, size, most, number) && *number >= least;
  }
  bool Text(char* text, size_t room) {
    const char* word;
    size_t size;
    if (!Next(&word, &size) || size >= room) return false;
    memcpy(text, word, size);
    text[size] = '\0';
    return true;
  }
  // Which of several known words comes next.
  template <size_t N>
  bool OneOf(const char* const (&known)[N], size_t* which) {
    const char* word;
    size_t size;
    if (!Next(&word, &size)) return false;
    for (*which = 0; *which < N; ++*which) {
      if (strlen(known[*which]) == size && memcmp(known[*which], word, size) == 0) return true;
    }
    return false;
  }
  bool more() const { return more_; }

 private:
  const char* text_;
  size_t left_;
  bool more_;
};

struct Index {
  int64_t context = 0;
  int64_t vocabulary = 0;
  int64_t parameters = 0;
  char triple[64] = "";
  Array<CacheShape> caches;
  Array<int64_t> eos;
  Array<FeatureName> features;
  Array<Weight> weights;

  void Read(const char* path) {
    MappedFile file;
    file.Require(path);
    Parse(path, file.data, file.size);
  }

  // Reads the bytes of `path`.
  void Parse(const char* path, const char* text, size_t size) {
    static const char kVersion[] = "hikui-tvm 1\n";
    path_ = path;
    if (size > kMaxIndexBytes) Stop(kFailure, "%s has %zu bytes, which no index has; copy the artefact again", path, size);
    if (size < strlen(kVersion) || memcmp(text, kVersion, strlen(kVersion)) != 0) {
      Stop(kFailure, "%s is not an index that this runner reads; lower the model again", path);
    }
    bool ended = false;
    line_ = 1;
    for (size_t at = strlen(kVersion); at < size;) {
      const char* end = static_cast<const char*>(memchr(text + at, '\n', size - at));
      if (end == nullptr) Stop(kFailure, "%s is cut short; copy the artefact again", path);
      ++line_;
      if (ended) Damaged("it goes on after its end");
      size_t length = static_cast<size_t>(end - (text + at));
      for (size_t byte = at; byte < at + length; ++byte) {
        if (static_cast<unsigned char>(text[byte]) < 0x20) Damaged("it holds a byte that is no text");
      }
      Words words(text + at, length);
      ended = Line(&words);
      if (words.more()) Damaged("it has a word too many");
      at += length + 1;
    }
    if (!ended) Stop(kFailure, "%s is cut short; copy the artefact again", path);
    CheckWhole();
  }

 private:
  [[noreturn]] void Damaged(const char* why) const {
    Stop(kFailure, "%s is damaged in line %zu: %s; copy the artefact again", path_, line_, why);
  }

  // Reads one line; true for the last one.
  bool Line(Words* words) {
    static const char* const kLines[] = {"target", "context", "vocabulary", "parameters", "cache",
                                         "eos",    "feature", "weight",     "end"};
    size_t which = 0;
    if (!words->OneOf(kLines, &which)) Damaged("it begins with no word of an index");
    if (which < 4) {
      if (seen_[which]) Damaged("it says again what another line has said");
      seen_[which] = true;
    }
    bool read = true;
    switch (which) {
      case 0: read = TargetLine(words); break;
      case 1: read = words->Number(1, kMaxTokens, &context); break;
      case 2: read = words->Number(1, kMaxTokens, &vocabulary); break;
      case 3: read = words->Number(0, kMaxBytes, &parameters); break;
      case 4: read = CacheLine(words); break;
      case 5: read = EosLine(words); break;
      case 6: read = FeatureLine(words); break;
      case 7: read = WeightLine(words); break;
      default: return true;
    }
    if (!read) Damaged("a word is missing, or is no number that can stand there");
    return false;
  }

  bool TargetLine(Words* words) {
    const char* word;
    size_t size;
    return words->Next(&word, &size) && words->Text(triple, sizeof(triple)) && words->Next(&word, &size);
  }

  bool CacheLine(Words* words) {
    static const char* const kFormats[] = {"float32", "int8", "int4"};
    CacheShape cache = {};
    size_t format = 0;
    if (!words->Number(1, kMaxTokens, &cache.heads) || !words->Number(1, kMaxTokens, &cache.head_size)) return false;
    if (words->more() && !words->OneOf(kFormats, &format)) return false;
    cache.format = kFormats[format];
    caches.Add(cache);
    return true;
  }

  bool EosLine(Words* words) {
    int64_t token = 0;
    if (!words->Number(0, kMaxTokens, &token)) return false;
    eos.Add(token);
    return true;
  }

  bool FeatureLine(Words* words) {
    FeatureName name = {};
    if (!words->Text(name.text, sizeof(name.text))) return false;
    features.Add(name);
    return true;
  }

  bool WeightLine(Words* words) {
    static const char* const kTypes[] = {"float32", "float16", "int8", "uint8", "int32", "int64", "bool"};
    static const int64_t kItemBytes[] = {4, 2, 1, 1, 4, 8, 1};
    Weight weight = {};
    size_t type = 0;
    if (!words->OneOf(kTypes, &type) || !words->Number(0, kMaxBytes, &weight.offset) ||
        !words->Number(0, kMaxBytes, &weight.bytes) || !words->Number(0, kMaxRank, &weight.rank)) {
      return false;
    }
    // Strides are products too, whose factors are no zeros.
    int64_t bytes = kItemBytes[type], extent = kItemBytes[type];
    for (int64_t axis = 0; axis < weight.rank; ++axis) {
      if (!words->Number(0, kMaxSize, &weight.shape[axis])) return false;
      const int64_t size = weight.shape[axis];
      if (__builtin_mul_overflow(extent, size > 0 ? size : 1, &extent)) Damaged("the tensor is larger than any memory");
      bytes *= size;
    }
    const char* name;
    size_t size;
    if (!words->Next(&name, &size)) return false;
    if (bytes != weight.bytes) Damaged("the tensor's shape does not have its bytes");
    weight.dtype = kTypes[type];
    weights.Add(weight);
    return true;
  }

  // What lines say of each other.
  void CheckWhole() const {
    for (bool seen : seen_) {
      if (!seen) Stop(kFailure, "%s is cut short: a line is missing; copy the artefact again", path_);
    }
    for (int64_t token : eos) {
      if (token >= vocabulary) {
        Stop(kFailure, "%s is damaged: token %lld ends a text, but the vocabulary has %lld; copy the artefact again", path_,
             static_cast<long long>(token), static_cast<long long>(vocabulary));
      }
    }
    for (const CacheShape& cache : caches) {
      int64_t bytes = 4;
      const bool nibbles = strcmp(cache.format, "int4") == 0;
      if (__builtin_mul_overflow(bytes, cache.heads, &bytes) || __builtin_mul_overflow(bytes, context, &bytes) ||
          __builtin_mul_overflow(bytes, cache.head_size, &bytes) || bytes > kMaxBytes ||
          (nibbles && cache.head_size % 2 != 0)) {
        Stop(kFailure, "%s is damaged: no cache is %lld heads of %lld; copy the artefact again", path_,
             static_cast<long long>(cache.heads), static_cast<long long>(cache.head_size));
      }
    }
    int64_t end = 0;
    for (const Weight& weight : weights) {
      if (weight.offset % 64 != 0 || weight.offset < end || weight.offset > parameters ||
          weight.bytes > parameters - weight.offset) {
        Stop(kFailure, "%s and model.params do not belong together: a tensor does not lie where it could; copy the artefact "
             "again", path_);
      }
      end = weight.offset + weight.bytes;
    }
  }

  const char* path_ = "";
  size_t line_ = 0;
  bool seen_[4] = {};  // target, context, vocabulary, parameters
};

}  // namespace hikui
