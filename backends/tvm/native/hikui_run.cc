// hikui-run: runs a lowered model on the board, with the cache, greedily, from token ids.
//
// The CPU is checked before the model's library is loaded, because code for a better CPU would die without a word.

#include <dlfcn.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include "engine.h"
#include "features.h"
#include "index.h"
#include "options.h"
#include "support.h"
#include "text.h"

namespace hikui {

double Now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void ReadPrompt(const Options& options, const Index& index, Array<int64_t>* tokens) {
  if (options.tokens != nullptr) {
    ParseTokens(options.tokens, options.tokens + strlen(options.tokens), tokens);
  } else {
    MappedFile file;
    if (!file.Open(options.tokens_file)) Stop(kUsage, "there is no file %s", options.tokens_file);
    ParseTokens(file.data, file.data + file.size, tokens);
  }
  if (tokens->size() == 0) Stop(kUsage, "the prompt has no tokens");
  if (static_cast<int64_t>(tokens->size()) > index.context) {
    Stop(kFailure, "the prompt has %zu tokens, but the cache holds %lld; shorten it or lower the model with a larger --context",
         tokens->size(), static_cast<long long>(index.context));
  }
}

void CheckCpu(const Index& index) {
  for (const FeatureName& feature : index.features) {
    if (!CpuOffers(feature.text)) {
      Stop(kFailure, "this CPU lacks %s, which the model was lowered for; lower it for another --target", feature.text);
    }
  }
}

// What is written to a full disk or a closed pipe is lost, and whoever waits for it must not be told that all is well.
void Flush() {
  if (fflush(stdout) != 0 || ferror(stdout)) Stop(kFailure, "the output cannot be written: %s", strerror(errno));
}

// The first of the largest, as the reference chooses.
int64_t Largest(const float* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t at = 0; at < count; ++at) {
    if (!__builtin_isfinite(logits[at])) Stop(kFailure, "the model gives logits that are not finite, so there is no next token");
    if (logits[at] > logits[best]) best = at;
  }
  return best;
}

bool Contains(const Array<int64_t>& tokens, int64_t token) {
  for (int64_t candidate : tokens) {
    if (candidate == token) return true;
  }
  return false;
}

void PrintResult(const Array<int64_t>& tokens, const Array<char>& text, bool has_text, double first, double rate) {
  fputs("{\"tokens\": [", stdout);
  for (size_t at = 0; at < tokens.size(); ++at) printf("%s%lld", at == 0 ? "" : ", ", static_cast<long long>(tokens[at]));
  fputs("], \"text\": ", stdout);
  if (has_text) {
    PrintJson(text);
  } else {
    fputs("null", stdout);
  }
  printf(", \"first_token_seconds\": %.6f, \"tokens_per_second\": ", first);
  if (rate > 0) {
    printf("%.3f}\n", rate);
  } else {
    fputs("null}\n", stdout);
  }
}

void Generate(const Options& options, const Index& index, const TokenTexts& texts, Engine* engine) {
  Array<int64_t> prompt, written;
  Array<char> text;
  ReadPrompt(options, index, &prompt);
  FILE* dump = nullptr;
  if (options.dump_logits != nullptr && (dump = fopen(options.dump_logits, "wb")) == nullptr) {
    Stop(kFailure, "%s cannot be written: %s", options.dump_logits, strerror(errno));
  }
  double start = Now(), first = 0, last = 0;
  const int64_t* tokens = prompt.data();
  int64_t count = static_cast<int64_t>(prompt.size()), past = 0, token = 0;
  while (static_cast<int64_t>(written.size()) < options.max_new_tokens && past + count <= index.context) {
    const float* row = nullptr;
    while (count > 0) {
      int64_t chunk = count < options.chunk ? count : options.chunk;
      row = engine->Step(tokens, chunk, past) + (chunk - 1) * index.vocabulary;
      tokens += chunk;
      past += chunk;
      count -= chunk;
    }
    size_t vocabulary = static_cast<size_t>(index.vocabulary);
    if (dump != nullptr && fwrite(row, sizeof(float), vocabulary, dump) != vocabulary) {
      Stop(kFailure, "%s cannot be written: %s", options.dump_logits, strerror(errno));
    }
    token = Largest(row, index.vocabulary);
    last = Now();
    if (written.size() == 0) first = last;
    if (Contains(index.eos, token)) break;
    size_t before = text.size();
    texts.Append(token, &text);
    written.Add(token);
    if (!options.json && texts.present()) {
      fwrite(text.data() + before, 1, text.size() - before, stdout);
      Flush();
    } else if (!options.json) {
      printf("%s%lld", written.size() == 1 ? "" : ",", static_cast<long long>(token));
    }
    tokens = &token;
    count = 1;
  }
  if (dump != nullptr && fclose(dump) != 0) Stop(kFailure, "%s cannot be written: %s", options.dump_logits, strerror(errno));
  double rate = written.size() > 1 && last > first ? static_cast<double>(written.size() - 1) / (last - first) : 0;
  if (options.json) {
    PrintResult(written, text, texts.present(), first - start, rate);
  } else {
    putchar('\n');
  }
  Flush();
  if (options.verbose) fprintf(stderr, "hikui-run: first token after %.3f s, then %.1f tokens/s\n", first - start, rate);
}

void Serve(const Index& index, Engine* engine) {
  Array<int64_t> tokens;
  int64_t request[2];
  while (true) {
    size_t read = fread(request, 1, sizeof(request), stdin);
    if (ferror(stdin)) Stop(kFailure, "the requests cannot be read: %s", strerror(errno));
    if (read == 0) return;
    if (read < sizeof(request)) Stop(kFailure, "the request ends in its %zu bytes of head", sizeof(request));
    int64_t past = request[0], count = request[1];
    if (past < 0 || count < 1 || past > index.context || count > index.context - past) {
      Stop(kFailure, "%lld tokens after %lld do not fit the cache of %lld", static_cast<long long>(count),
           static_cast<long long>(past), static_cast<long long>(index.context));
    }
    tokens.Zeros(static_cast<size_t>(count));
    if (fread(tokens.data(), sizeof(int64_t), static_cast<size_t>(count), stdin) != static_cast<size_t>(count)) {
      Stop(kFailure, "the request ends before its tokens");
    }
    size_t values = static_cast<size_t>(count * index.vocabulary);
    if (fwrite(engine->Step(tokens.data(), count, past), sizeof(float), values, stdout) != values || fflush(stdout) != 0) {
      Stop(kFailure, "the answer cannot be written: %s", strerror(errno));
    }
  }
}

// How many cores this process may use; threads of one core count once. TVM's own guess takes every x86 for one with two
// threads a core and so leaves half of the others idle.
int64_t Cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 1;
  int64_t count = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    char path[96];
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE* file = fopen(path, "r");
    int first = cpu;
    if (file != nullptr) {
      if (fscanf(file, "%d", &first) != 1) first = cpu;
      fclose(file);
    }
    // A core whose first thread is not ours is counted by each of its others: too many are better than none.
    if (first == cpu || first < 0 || first >= CPU_SETSIZE || !CPU_ISSET(first, &allowed)) ++count;
  }
  return count > 0 ? count : 1;
}

// Says which instruction set the kernels in the model's library use here, and which formats only have the fallback.
void SayKernels(const Options& options) {
  void* library = dlopen(Path(options.directory, "model.so").c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return;
  auto isa = reinterpret_cast<const char* (*)()>(dlsym(library, "hikui_kernels_isa"));
  auto describe = reinterpret_cast<const char* (*)()>(dlsym(library, "hikui_kernels_describe"));
  if (isa == nullptr || describe == nullptr || isa() == nullptr) return;
  fprintf(stderr, "hikui-run: kernels for %s\n", isa());
  for (const char* line = describe(); *line != '\0';) {
    const char* end = strchr(line, '\n');
    const char* name = static_cast<const char*>(memmem(line, static_cast<size_t>(end - line), " generic", 8));
    if (name != nullptr) {
      fprintf(stderr, "hikui-run: fallback for %.*s\n", static_cast<int>(name - line), line);
    }
    line = end + 1;
  }
}

// A closed standard stream would be taken by the next file that is opened, and what is printed would go there.
void HoldStandardStreams() {
  // A reader that has gone is an error of writing like any other, not a signal.
  signal(SIGPIPE, SIG_IGN);
  const bool writable = fcntl(STDOUT_FILENO, F_GETFD) >= 0;
  for (int stream = open("/dev/null", O_RDWR); stream >= 0; stream = dup(stream)) {
    if (stream <= STDERR_FILENO) continue;
    close(stream);
    break;
  }
  if (!writable) Stop(kFailure, "the standard output is closed");
}

int Main(int count, char** words) {
  HoldStandardStreams();
  Options options = ParseOptions(count, words);
  if (options.help) {
    fputs(kHelp, stdout);
    Flush();
    _exit(0);
  }
  Index index;
  index.Read(Path(options.directory, "model.index").c_str());
  if (strcmp(index.triple, kTriple) != 0) {
    Stop(kFailure, "model.index is of a model for %s, but this runner is for %s; copy the artefact again", index.triple,
         kTriple);
  }
  CheckCpu(index);
  char threads[24];
  snprintf(threads, sizeof(threads), "%lld", static_cast<long long>(options.threads > 0 ? options.threads : Cores()));
  if (const char* wanted = getenv("TVM_NUM_THREADS")) Threads("TVM_NUM_THREADS", wanted);
  setenv("TVM_NUM_THREADS", threads, options.threads > 0);
  TokenTexts texts;
  texts.Open(Path(options.directory, "model.tokens").c_str(), index.vocabulary);
  double start = Now();
  Engine engine;
  engine.Load(options.directory, index);
  if (options.verbose) {
    fprintf(stderr, "hikui-run: loaded %zu weights, %lld bytes, in %.3f s\n", index.weights.size(),
            static_cast<long long>(index.parameters), Now() - start);
    SayKernels(options);
  }
  if (options.serve) {
    Serve(index, &engine);
  } else {
    Generate(options, index, texts, &engine);
  }
  Flush();
  // The virtual machine and its threads need no farewell.
  _exit(0);
}

}  // namespace hikui

int main(int count, char** words) { return hikui::Main(count, words); }
