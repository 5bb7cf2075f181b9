// Which variant decodes, how the vocabulary is shared out, and what follows from what the sweeps found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "../gumbel.h"
#include "arm_features.h"
#include "decode.h"
#include "decode_cut.h"
#include "threads.h"

namespace latentforge {

namespace {

constexpr int64_t kRowsAtOnce = 256;       // whose partials are held
constexpr int64_t kSearchedAtOnce = 32;    // whose histograms are held
constexpr int64_t kCandidates = 1024;      // for top-p
constexpr int64_t kMostCandidates = 4096;  // for top-k; beyond it, histograms

// A row between sweeps.
struct Row {
  int64_t row = 0;
  bool impossible = false;
  float highest = kMinusInfinity, best_score = kMinusInfinity, best_z = 0.0f;
  double mass = 0.0;
  int64_t best_id = -1;
  uint64_t cut = 0;
};

class Decoder {
 public:
  Decoder(const DecodeCall& call, const DecodeKernels& kernels, int threads)
      : call_(call), inverse_(call.inverse_temperature()) {
    const bool pair = call.weight_kind == WeightKind::bf16 && call.hidden_bf16;
    product_ = pair                                   ? kernels.bf16_pair
               : call.weight_kind == WeightKind::bf16 ? kernels.bf16
               : call.weight_kind == WeightKind::f32  ? kernels.f32
                                                      : kernels.int8;
    threads_ = std::max(threads, 1);
  }

  void run(int64_t first, int64_t count) {
    std::vector<Row> rows(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) rows[static_cast<size_t>(i)].row = first + i;
    const bool greedy = call_.temperature == 0.0;
    const bool limited = !greedy && ((call_.top_k > 0 && call_.top_k < call_.vocab) || call_.top_p < 1.0);
    std::vector<std::vector<uint64_t>> candidates;
    Sweep sweep = make(limited ? Task::candidates : greedy ? Task::greedy : Task::sample, rows);
    if (limited) sweep.keep = call_.top_k > 0 && call_.top_k <= kMostCandidates ? call_.top_k : kCandidates;
    go(sweep, limited ? &candidates : nullptr);
    merge(sweep, rows, true);
    if (limited) choose_within_limits(rows, candidates, sweep.keep);
    for (const Row& row : rows) write(row);
  }

 private:
  Sweep make(Task task, const std::vector<Row>& rows) const {
    Sweep sweep;
    sweep.call = &call_;
    sweep.task = task;
    sweep.rows.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      sweep.rows[i].row = rows[i].row;
      sweep.rows[i].highest = rows[i].highest;
      sweep.rows[i].cut = rows[i].cut;
    }
    return sweep;
  }

  // A sweep for some of the searches; `open` says whose rows they are.
  Sweep make(Task task, const std::vector<Row>& rows, const std::vector<size_t>& open,
             const std::vector<Search>& searches, const std::vector<size_t>& some) const {
    std::vector<Row> swept;
    for (const size_t j : some) swept.push_back(rows[open[j]]);
    Sweep sweep = make(task, swept);
    for (size_t n = 0; n < some.size(); ++n) {
      sweep.rows[n].buckets = searches[some[n]].buckets();
      sweep.rows[n].bucket = searches[some[n]].bucket();
    }
    return sweep;
  }

  // Runs the segments; what the threads held of each row comes back together.
  void go(Sweep& sweep, std::vector<std::vector<uint64_t>>* held,
          std::vector<std::vector<Bucket>>* histograms = nullptr) {
    product_.pack(sweep);
    const int64_t segments = sweep.segments();
    const size_t rows = sweep.rows.size();
    sweep.partials.assign(rows * static_cast<size_t>(segments), {});
    // A thread is worth its start from about a million multiplications.
    const int64_t useful = static_cast<int64_t>(rows) * call_.vocab * call_.width / (1 << 20);
    const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads_, useful, segments})));
    std::vector<std::vector<RowMemory>> memory(static_cast<size_t>(threads));
    std::atomic<int64_t> next{0};
    on_threads(threads, [&](int index) {
      const FlushDenormals flush;
      auto& own = memory[static_cast<size_t>(index)];
      own.resize(rows);
      for (int64_t segment = next.fetch_add(1); segment < segments; segment = next.fetch_add(1))
        product_.segment(sweep, segment, own);
    });
    if (held != nullptr) {
      held->assign(rows, {});
      for (const auto& own : memory)
        for (size_t i = 0; i < own.size(); ++i)
          (*held)[i].insert((*held)[i].end(), own[i].held.begin(), own[i].held.end());
      for (auto& ranks : *held) sort_ranks(ranks);
    }
    if (histograms != nullptr) {
      histograms->assign(rows, std::vector<Bucket>(kBuckets));
      for (const auto& own : memory)
        for (size_t i = 0; i < own.size(); ++i)
          for (size_t j = 0; j < own[i].histogram.size(); ++j) add((*histograms)[i][j], own[i].histogram[j]);
    }
  }

  static void add(Bucket& sum, const Bucket& part) {
    sum.mass += part.mass;
    sum.count += part.count;
    sum.highest_key = std::max(sum.highest_key, part.highest_key);
    sum.lowest_key = std::min(sum.lowest_key, part.lowest_key);
  }

  // In the segments' order, in fp64.
  void merge(const Sweep& sweep, std::vector<Row>& rows, bool with_mass) const {
    const auto segments = static_cast<size_t>(sweep.segments());
    for (size_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[i];
      const Partial* parts = sweep.partials.data() + i * segments;
      for (size_t s = 0; s < segments; ++s) {
        row.impossible = row.impossible || parts[s].impossible;
        if (with_mass) row.highest = std::max(row.highest, parts[s].highest);
        if (!(parts[s].best_score > row.best_score)) continue;  // of equals the first
        row.best_score = parts[s].best_score;
        row.best_z = parts[s].best_z;
        row.best_id = parts[s].best_id;
      }
      if (!with_mass || row.highest == kMinusInfinity) continue;
      for (size_t s = 0; s < segments; ++s)
        if (parts[s].highest != kMinusInfinity)
          row.mass +=
              parts[s].mass * std::exp(static_cast<double>(parts[s].highest) - static_cast<double>(row.highest));
    }
  }

  // Top-k, then top-p within it, then the draw.
  void choose_within_limits(std::vector<Row>& rows, std::vector<std::vector<uint64_t>>& candidates, int64_t keep) {
    for (auto& ranks : candidates)
      if (static_cast<int64_t>(ranks.size()) > keep) ranks.resize(static_cast<size_t>(keep));
    std::vector<double> mass(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) mass[i] = rows[i].mass * kMassUnit;
    if (call_.top_k > 0 && call_.top_k < call_.vocab)
      end_at(
          rows, candidates, keep, [&](size_t) { return Goal{false, 0.0, static_cast<uint64_t>(call_.top_k)}; }, &mass);
    if (call_.top_p < 1.0)
      end_at(rows, candidates, keep, [&](size_t i) { return Goal{true, call_.top_p * mass[i], 0}; }, nullptr);
    std::vector<Row> far;
    std::vector<size_t> from;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (dead(rows[i])) continue;
      const bool all_held = static_cast<int64_t>(candidates[i].size()) < keep;
      if (all_held || (rows[i].cut != 0 && rows[i].cut >= candidates[i].back())) {
        draw_from(candidates[i], rows[i]);
      } else {
        far.push_back(rows[i]);
        from.push_back(i);
      }
    }
    if (far.empty()) return;
    Sweep sweep = make(Task::sample, far);
    go(sweep, nullptr);
    merge(sweep, far, false);
    for (size_t j = 0; j < far.size(); ++j) rows[from[j]] = far[j];
  }

  static bool dead(const Row& row) { return row.impossible || row.highest == kMinusInfinity; }

  // Moves each row's cut to the end of the shortest prefix that reaches its goal; `mass` becomes that of the prefix.
  template <class GoalOf>
  void end_at(std::vector<Row>& rows, const std::vector<std::vector<uint64_t>>& candidates, int64_t keep, GoalOf goal,
              std::vector<double>* mass) {
    std::vector<size_t> open;
    std::vector<Search> searches;
    const auto finish = [&](size_t i, const Search& search) {
      rows[i].cut = std::max(rows[i].cut, search.cut());
      if (mass != nullptr) (*mass)[i] = static_cast<double>(search.mass());
    };
    for (size_t i = 0; i < rows.size(); ++i) {
      if (dead(rows[i])) continue;
      Search search(goal(i), rows[i].highest, inverse_);
      const bool all_held = static_cast<int64_t>(candidates[i].size()) < keep;
      if (search.walk(candidates[i]) || all_held) {
        finish(i, search);
        continue;
      }
      search.look_below(candidates[i]);
      open.push_back(i);
      searches.push_back(search);
    }
    for (size_t start = 0; start < open.size(); start += kSearchedAtOnce) {
      std::vector<size_t> narrowing, collecting;  // of `open` and `searches`
      for (size_t j = start; j < std::min(open.size(), start + kSearchedAtOnce); ++j) narrowing.push_back(j);
      while (!narrowing.empty()) {
        std::vector<std::vector<Bucket>> histograms;
        Sweep sweep = make(Task::histogram, rows, open, searches, narrowing);
        go(sweep, nullptr, &histograms);
        std::vector<size_t> still;
        for (size_t n = 0; n < narrowing.size(); ++n) {
          Search& search = searches[narrowing[n]];
          if (!search.narrow(histograms[n], call_.vocab))
            finish(open[narrowing[n]], search);
          else
            (search.collecting() ? collecting : still).push_back(narrowing[n]);
        }
        narrowing = still;
      }
      if (collecting.empty()) continue;
      std::vector<std::vector<uint64_t>> held;
      Sweep sweep = make(Task::collect, rows, open, searches, collecting);
      go(sweep, &held);
      for (size_t n = 0; n < collecting.size(); ++n) {
        searches[collecting[n]].walk(held[n]);
        finish(open[collecting[n]], searches[collecting[n]]);
      }
    }
  }

  void draw_from(const std::vector<uint64_t>& ranked, Row& row) const {
    for (const uint64_t token : ranked) {
      if (token < row.cut) break;
      const int64_t id = rank_id(token);
      const float z = from_order_key(rank_key(token));
      const float score = z * inverse_ + gumbel(call_.seeds[row.row], call_.positions[row.row], id);
      if (score < row.best_score || (score == row.best_score && id > row.best_id && row.best_id >= 0)) continue;
      row.best_score = score;
      row.best_z = z;
      row.best_id = id;
    }
  }

  void write(const Row& row) const {
    const bool none = dead(row) || row.best_id < 0;
    call_.ids[row.row] = none ? -1 : row.best_id;
    const double s = static_cast<double>(row.best_z * inverse_);
    call_.logprobs[row.row] = none ? std::numeric_limits<float>::quiet_NaN()
                                   : static_cast<float>((s - static_cast<double>(row.highest)) - std::log(row.mass));
  }

  const DecodeCall& call_;
  float inverse_;
  Product product_;
  int threads_;
};

}  // namespace

std::vector<std::string> decode_variants() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512_bf16");
  if (vnni) found.emplace_back("avx512_vnni");
  if (avx512) found.emplace_back("avx512");
  if (avx2) found.emplace_back("avx2");
#elif defined(__aarch64__)
  if (has_bf16_and_dot_products()) found.emplace_back("neon_bf16");
  found.emplace_back("neon");
#endif
  found.emplace_back("baseline");
  return found;
}

const DecodeKernels& find_decode_kernels(const std::string& variant) {
  const auto available = decode_variants();
  if (std::find(available.begin(), available.end(), variant) == available.end())
    throw std::invalid_argument("this machine has no '" + variant + "' variant");
#if defined(__x86_64__)
  if (variant == "avx512_bf16") return avx512_bf16_decode_kernels();
  if (variant == "avx512_vnni") return avx512_vnni_decode_kernels();
  if (variant == "avx512") return avx512_decode_kernels();
  if (variant == "avx2") return avx2_decode_kernels();
#elif defined(__aarch64__)
  if (variant == "neon_bf16") return neon_bf16_decode_kernels();
  if (variant == "neon") return neon_decode_kernels();
#endif
  return baseline_decode_kernels();
}

void decode_rows(const DecodeCall& call, const std::string& variant, int threads) {
  Decoder decoder(call, find_decode_kernels(variant), threads);
  const FlushDenormals flush;
  for (int64_t first = 0; first < call.rows; first += kRowsAtOnce)
    decoder.run(first, std::min(kRowsAtOnce, call.rows - first));
}

}  // namespace latentforge
