// The runner's command line, and token ids as text.
#pragma once

#include "support.h"

namespace hikui {

constexpr char kHelp[] =
    "usage: hikui-run DIR (--tokens 1,2,3 | --tokens-file FILE | --serve) [options]\n"
    "\n"
    "Runs the model in DIR and prints what it writes.\n"
    "\n"
    "  --tokens IDS           the prompt's token ids, separated by commas\n"
    "  --tokens-file FILE     the same, from a file; commas and white space separate\n"
    "  --max-new-tokens N     how many tokens to write at most (64)\n"
    "  --chunk N              how many tokens of the prompt to run at once (64)\n"
    "  --threads N            how many threads to use (all cores)\n"
    "  --json                 print tokens, text and times as JSON\n"
    "  --dump-logits FILE     write the logits that chose each token, float32\n"
    "  --verbose              say what is done, on stderr\n"
    "  --serve                answer requests on stdin: int64 past, int64 T, T int64 token ids; the answer on stdout is\n"
    "                         the T rows of logits, float32\n";

struct Options {
  const char* directory = nullptr;
  const char* tokens = nullptr;
  const char* tokens_file = nullptr;
  const char* dump_logits = nullptr;
  int64_t max_new_tokens = 64;
  int64_t chunk = 64;
  int64_t threads = 0;
  bool help = false;
  bool json = false;
  bool serve = false;
  bool verbose = false;
};

// More threads than this many for each processor only wait for each other, and each takes memory.
constexpr int64_t kThreadsPerProcessor = 16;

inline int64_t Positive(const char* option, const char* text, int64_t most) {
  int64_t number = 0;
  if (!ReadNumber(text, strlen(text), most, &number) || number < 1) {
    Stop(kUsage, "%s takes a whole number from 1 to %lld, not '%s'", option, static_cast<long long>(most), text);
  }
  return number;
}

inline int64_t Threads(const char* option, const char* text) {
  const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  return Positive(option, text, kThreadsPerProcessor * (processors > 0 ? processors : 1));
}

inline Options ParseOptions(int count, char** words) {
  Options options;
  for (int at = 1; at < count; ++at) {
    const char* word = words[at];
    auto value = [&]() -> const char* {
      if (at + 1 >= count) Stop(kUsage, "%s takes a value", word);
      return words[++at];
    };
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
      options.help = true;
      return options;
    } else if (strcmp(word, "--tokens") == 0) {
      options.tokens = value();
    } else if (strcmp(word, "--tokens-file") == 0) {
      options.tokens_file = value();
    } else if (strcmp(word, "--dump-logits") == 0) {
      options.dump_logits = value();
    } else if (strcmp(word, "--max-new-tokens") == 0) {
      options.max_new_tokens = Positive(word, value(), INT32_MAX);
    } else if (strcmp(word, "--chunk") == 0) {
      options.chunk = Positive(word, value(), INT32_MAX);
    } else if (strcmp(word, "--threads") == 0) {
      options.threads = Threads(word, value());
    } else if (strcmp(word, "--json") == 0) {
      options.json = true;
    } else if (strcmp(word, "--serve") == 0) {
      options.serve = true;
    } else if (strcmp(word, "--verbose") == 0) {
      options.verbose = true;
    } else if (word[0] == '-') {
      Stop(kUsage, "there is no option %s; --help lists them", word);
    } else if (options.directory != nullptr) {
      Stop(kUsage, "one artefact at a time: %s and %s were given", options.directory, word);
    } else {
      options.directory = word;
    }
  }
  if (options.directory == nullptr) Stop(kUsage, "name the artefact's directory; --help says more");
  if ((options.tokens != nullptr) + (options.tokens_file != nullptr) + options.serve != 1) {
    Stop(kUsage, "give exactly one of --tokens, --tokens-file and --serve");
  }
  return options;
}

inline bool Separates(char byte) { return byte == ',' || byte == ' ' || byte == '\n' || byte == '\t' || byte == '\r'; }

inline void ParseTokens(const char* text, const char* end, Array<int64_t>* tokens) {
  while (text < end) {
    if (Separates(*text)) {
      ++text;
      continue;
    }
    const char* start = text;
    while (text < end && !Separates(*text)) ++text;
    int64_t token = 0;
    if (!ReadNumber(start, static_cast<size_t>(text - start), INT32_MAX, &token)) {
      const int shown = text - start < 40 ? static_cast<int>(text - start) : 40;
      Stop(kUsage, "'%.*s' is no token id; ids are whole numbers without zeros ahead, commas between them", shown, start);
    }
    tokens->Add(token);
  }
}

}  // namespace hikui
