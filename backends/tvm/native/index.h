// model.index: what the model is and where its weights lie. backends/tvm/index.py describes the lines.
#pragma once

#include "support.h"

namespace hikui {

constexpr int kMaxRank = 8;

struct CacheShape {
  int64_t heads;
  int64_t head_size;
  const char* format;  // float32, int8 or int4
};

struct Weight {
  char dtype[16];
  uint64_t offset;
  uint64_t bytes;
  int rank;
  int64_t shape[kMaxRank];
};

struct FeatureName {
  char text[32];
};

struct Index {
  int64_t context = 0;
  int64_t vocabulary = 0;
  uint64_t parameters = 0;
  Array<CacheShape> caches;
  Array<int64_t> eos;
  Array<FeatureName> features;
  Array<Weight> weights;

  void Read(const char* path) {
    FILE* file = fopen(path, "r");
    if (file == nullptr) Stop(kFailure, "%s cannot be read: %s", path, strerror(errno));
    char* line = nullptr;
    size_t room = 0;
    bool ended = false;
    if (getline(&line, &room, file) < 0 || strcmp(line, "hikui-tvm 1\n") != 0) {
      Stop(kFailure, "%s is not an index that this runner reads; lower the model again", path);
    }
    while (getline(&line, &room, file) >= 0) {
      if (ended || !Line(line, &ended)) Stop(kFailure, "%s is damaged; copy the artefact again", path);
    }
    free(line);
    fclose(file);
    if (!ended || context < 1 || vocabulary < 1) Stop(kFailure, "%s is cut short; copy the artefact again", path);
  }

 private:
  bool Line(char* line, bool* ended) {
    char* rest = nullptr;
    const char* word = strtok_r(line, " \n", &rest);
    if (word == nullptr) return false;
    if (strcmp(word, "target") == 0) return true;  // for whoever starts the runner
    if (strcmp(word, "context") == 0) return Number(&rest, &context);
    if (strcmp(word, "vocabulary") == 0) return Number(&rest, &vocabulary);
    if (strcmp(word, "parameters") == 0) return Number(&rest, &parameters);
    if (strcmp(word, "cache") == 0) {
      CacheShape cache = {};
      bool read = Number(&rest, &cache.heads) && Number(&rest, &cache.head_size) && Format(&rest, &cache.format);
      caches.Add(cache);
      return read;
    }
    if (strcmp(word, "eos") == 0) {
      int64_t token = 0;
      bool read = Number(&rest, &token);
      eos.Add(token);
      return read;
    }
    if (strcmp(word, "feature") == 0) {
      FeatureName name = {};
      bool read = Word(&rest, name.text, sizeof(name.text));
      features.Add(name);
      return read;
    }
    if (strcmp(word, "weight") == 0) return WeightLine(&rest);
    *ended = strcmp(word, "end") == 0;
    return *ended;
  }

  bool WeightLine(char** rest) {
    Weight weight = {};
    bool read = Word(rest, weight.dtype, sizeof(weight.dtype)) && Number(rest, &weight.offset) &&
                Number(rest, &weight.bytes) && Number(rest, &weight.rank) && weight.rank >= 0 && weight.rank <= kMaxRank;
    for (int axis = 0; read && axis < weight.rank; ++axis) read = Number(rest, &weight.shape[axis]);
    weights.Add(weight);
    return read;
  }

  // The last word of a line; where it is left out, float32.
  static bool Format(char** rest, const char** format) {
    static const char* const kFormats[] = {"float32", "int8", "int4"};
    const char* word = strtok_r(nullptr, " \n", rest);
    for (const char* known : kFormats) {
      if (word == nullptr || strcmp(word, known) == 0) {
        *format = known;
        return true;
      }
    }
    return false;
  }

  static bool Word(char** rest, char* text, size_t room) {
    const char* word = strtok_r(nullptr, " \n", rest);
    if (word == nullptr || strlen(word) >= room) return false;
    strcpy(text, word);
    return true;
  }

  template <typename T>
  static bool Number(char** rest, T* value) {
    const char* word = strtok_r(nullptr, " \n", rest);
    if (word == nullptr) return false;
    char* end = nullptr;
    errno = 0;
    long long number = strtoll(word, &end, 10);
    *value = static_cast<T>(number);
    return *end == '\0' && errno == 0 && number >= 0;
  }
};

}  // namespace hikui
