// A libFuzzer target over what the board's runner reads: model.index, model.tokens and lists of token ids.
//
// The first byte of an input chooses the reader, the others are the file. Every input must be read or refused with a
// sentence; anything else is a crash of the sanitisers.
#include <stdint.h>

namespace {
struct Refused {};
}  // namespace

#define HIKUI_LEAVE(code) throw Refused()
#include "index.h"
#include "options.h"
#include "text.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  // A copy without a byte to spare, so that reading past the end is seen.
  const size_t length = size - 1;
  char* file = static_cast<char*>(malloc(length));
  memcpy(file, data + 1, length);
  int outcome = 0;
  try {
    if (data[0] % 3 == 0) {
      hikui::Index index;
      index.Parse("model.index", file, length);
      for (const hikui::Weight& weight : index.weights) {
        if (weight.offset + weight.bytes > index.parameters) __builtin_trap();
      }
      for (int64_t token : index.eos) {
        if (token < 0 || token >= index.vocabulary) __builtin_trap();
      }
    } else if (data[0] % 3 == 1) {
      hikui::TokenTexts texts;
      texts.Parse("model.tokens", file, length, 4);
      hikui::Array<char> text;
      for (int64_t token = -1; token <= 4; ++token) texts.Append(token, &text);
      if (text.size() > length) __builtin_trap();
    } else {
      hikui::Array<int64_t> tokens;
      hikui::ParseTokens(file, file + length, &tokens);
      if (tokens.size() > length) __builtin_trap();
    }
    outcome = 1;
  } catch (const Refused&) {
  }
  free(file);
#ifdef HIKUI_STANDALONE
  return outcome;
#else
  return 0;
#endif
}

#ifdef HIKUI_STANDALONE
// Without libFuzzer: mutates the files that it is given, `runs` times from `seed`.
//
//     runner_files SEED RUNS FILE…        prints "RUNS READ REFUSED"
#include <vector>

namespace {
uint64_t state;
uint64_t Random(uint64_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state % below;
}

const char* const kPieces[] = {"-1", "0", "18446744073709551615", "9223372036854775807", "4294967296", " ", "\n", "weight ",
                               "eos ", "cache ", "end\n", "vocabulary ", "int4", ","};

void Mutate(std::vector<uint8_t>* input) {
  for (uint64_t times = 1 + Random(4); times > 0; --times) {
    const size_t size = input->size(), at = 1 + Random(size);
    switch (Random(6)) {
      case 0: if (at < size) (*input)[at] ^= static_cast<uint8_t>(1 << Random(8)); break;
      case 1: if (at < size) (*input)[at] = static_cast<uint8_t>(Random(256)); break;
      case 2: input->resize(at); break;
      case 3: if (at < size) input->erase(input->begin() + static_cast<long>(at)); break;
      case 4: {
        const char* piece = kPieces[Random(sizeof(kPieces) / sizeof(kPieces[0]))];
        input->insert(input->begin() + static_cast<long>(at), piece, piece + strlen(piece));
        break;
      }
      default: {  // a part of the file once more, somewhere else
        const size_t from = 1 + Random(size), count = Random(size - from + 1);
        const std::vector<uint8_t> part(input->begin() + static_cast<long>(from),
                                        input->begin() + static_cast<long>(from + count));
        input->insert(input->begin() + static_cast<long>(at), part.begin(), part.end());
      }
    }
  }
}
}  // namespace

int main(int count, char** words) {
  if (count < 4) return 2;
  state = strtoull(words[1], nullptr, 10) * 2654435761u + 88172645463325252u;
  const long runs = strtol(words[2], nullptr, 10);
  if (freopen("/dev/null", "w", stderr) == nullptr) return 2;
  long outcomes[2] = {0, 0};
  for (long run = 0; run < runs; ++run) {
    // The last letter of a file's name is its reader.
    const char* name = words[3 + run % (count - 3)];
    std::vector<uint8_t> input(1, static_cast<uint8_t>(name[strlen(name) - 1] - '0'));
    FILE* file = fopen(name, "rb");
    if (file == nullptr) return 2;
    for (int byte; (byte = fgetc(file)) != EOF;) input.push_back(static_cast<uint8_t>(byte));
    fclose(file);
    if (run >= count - 3) Mutate(&input);
    ++outcomes[LLVMFuzzerTestOneInput(input.data(), input.size())];
  }
  printf("%ld %ld %ld\n", runs, outcomes[1], outcomes[0]);
  return 0;
}
#endif
