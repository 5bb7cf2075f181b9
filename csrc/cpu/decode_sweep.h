// One segment of the vocabulary for all rows of a sweep: products, then what the task wants of each row's logits. The
// logits live in a block on the stack; loops over a block are for the compiler to make vectors of.
#pragma once

#include <algorithm>
#include <functional>

#include "decode_math.h"
#include "decode_noise.h"
#include "decode_tile.h"

namespace latentforge {
namespace {

static_assert(kBlock == kNoiseBlock && kSegment % kBlock == 0);

struct BlockLogits {
  alignas(64) float z[kBlock];  // minus infinity beyond the vocabulary
  alignas(64) float s[kBlock];  // z / T
  alignas(64) int32_t key[kBlock];
  int32_t highest_key;
  float highest_s;
  bool impossible;
};

// Bias, scale and soft cap; then the forms in which the tasks read the logits.
inline void shape(const DecodeCall& call, int64_t first, int64_t tokens, BlockLogits& b) {
  if (call.bias != nullptr) {
    if (call.bias_bf16)
      for (int64_t i = 0; i < tokens; ++i) b.z[i] += widened(static_cast<const uint16_t*>(call.bias)[first + i]);
    else
      for (int64_t i = 0; i < tokens; ++i) b.z[i] += static_cast<const float*>(call.bias)[first + i];
  }
  if (call.logit_scale != 1.0f)
    for (int64_t i = 0; i < kBlock; ++i) b.z[i] *= call.logit_scale;
  if (call.soft_cap != 0.0f) {
    const float cap = call.soft_cap;
    for (int64_t i = 0; i < tokens; ++i)
      if (b.z[i] != kMinusInfinity) b.z[i] = cap * tanh_of(b.z[i] / cap);
  }
  for (int64_t i = tokens; i < kBlock; ++i) b.z[i] = kMinusInfinity;
  const float inverse = call.inverse_temperature();
  int32_t highest = std::numeric_limits<int32_t>::min(), impossible = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const float z = b.z[i] + 0.0f;
    b.z[i] = z;
    b.s[i] = z * inverse;
    b.key[i] = order_key(z);
    highest = b.key[i] > highest ? b.key[i] : highest;
    impossible |= is_impossible(b.s[i]);
  }
  b.highest_key = highest;
  b.highest_s = from_order_key(highest) * inverse;
  b.impossible = impossible != 0;
}

// Sum of exp(s - reference) over the block, in one order.
inline double mass_of(const BlockLogits& b, float reference) {
  float lane[16] = {};
  for (int64_t i = 0; i < kBlock; i += 16)
    for (int64_t j = 0; j < 16; ++j) lane[j] += exp_of_negative(b.s[i + j] - reference);
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return static_cast<double>(lane[0]);
}

inline void add_mass(const BlockLogits& b, Partial& p) {
  if (b.highest_s == kMinusInfinity) return;
  if (b.highest_s > p.highest) {
    if (p.mass != 0.0) p.mass *= std::exp(static_cast<double>(p.highest) - static_cast<double>(b.highest_s));
    p.highest = b.highest_s;
  }
  p.mass += mass_of(b, p.highest);
}

// The best score of the block, where it beats the partial's; strictly, so that of equals the lowest id stays.
inline void offer_best(const BlockLogits& b, const int32_t* key, int32_t highest, int64_t first, Partial& p) {
  if (highest <= order_key(p.best_score)) return;
  const int64_t at = std::find(key, key + kBlock, highest) - key;
  p.best_score = from_order_key(highest);
  p.best_z = b.z[at];
  p.best_id = static_cast<int32_t>(first + at);
}

inline void offer_candidates(const BlockLogits& b, int64_t first, int64_t keep, RowMemory& memory) {
  if (memory.threshold == 0) memory.threshold = rank(order_key(kMinusInfinity), 0);
  if (b.highest_key < rank_key(memory.threshold)) return;
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint64_t candidate = rank(b.key[i], first + i);
    if (candidate <= memory.threshold) continue;
    memory.held.push_back(candidate);
    if (static_cast<int64_t>(memory.held.size()) < 2 * keep) continue;
    std::nth_element(memory.held.begin(), memory.held.begin() + (keep - 1), memory.held.end(), std::greater<>());
    memory.held.resize(static_cast<size_t>(keep));
    memory.threshold = memory.held.back();
  }
}

// -1: above or below what the histogram covers.
inline int bucket_of(const Buckets& buckets, float z, int32_t key, int64_t id) {
  switch (buckets.kind) {
    case Buckets::Kind::linear: {
      if (z > buckets.high || z == kMinusInfinity) return -1;
      return static_cast<int>(std::min((buckets.high - z) * buckets.per_logit, static_cast<float>(kBuckets - 1)));
    }
    case Buckets::Kind::keys:
      if (key > buckets.highest_key || key < buckets.lowest_key) return -1;
      return static_cast<int>((static_cast<int64_t>(buckets.highest_key) - key) >> buckets.shift);
    default:
      return key == buckets.highest_key ? static_cast<int>(id >> buckets.shift) : -1;
  }
}

inline void fill_histogram(const BlockLogits& b, int64_t first, const SweepRow& row, RowMemory& memory) {
  if (memory.histogram.empty()) memory.histogram.resize(kBuckets);
  for (int64_t i = 0; i < kBlock; ++i) {
    const int index = bucket_of(row.buckets, b.z[i], b.key[i], first + i);
    if (index < 0) continue;
    Bucket& bucket = memory.histogram[static_cast<size_t>(index)];
    bucket.mass += mass_units(b.s[i], row.highest);
    ++bucket.count;
    bucket.highest_key = std::max(bucket.highest_key, b.key[i]);
    bucket.lowest_key = std::min(bucket.lowest_key, b.key[i]);
  }
}

inline void collect_bucket(const BlockLogits& b, int64_t first, const SweepRow& row, RowMemory& memory) {
  for (int64_t i = 0; i < kBlock; ++i)
    if (bucket_of(row.buckets, b.z[i], b.key[i], first + i) == row.bucket)
      memory.held.push_back(rank(b.key[i], first + i));
}

inline void draw(const DecodeCall& call, const BlockLogits& b, int64_t first, const SweepRow& row, Partial& p) {
  float score[kBlock];
  noise_block(call.seeds[row.row], call.positions[row.row], first / kBlock, score);
  if (row.cut != 0)
    for (int64_t i = 0; i < kBlock; ++i)
      if (rank(b.key[i], first + i) < row.cut) score[i] = kMinusInfinity;
  int32_t key[kBlock], highest = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < kBlock; ++i) {
    key[i] = order_key((b.s[i] + score[i]) + 0.0f);
    highest = key[i] > highest ? key[i] : highest;
  }
  offer_best(b, key, highest, first, p);
}

inline void use_block(Sweep& sweep, const BlockLogits& b, int64_t first, const SweepRow& row, Partial& p,
                      RowMemory& memory) {
  p.impossible = p.impossible || b.impossible;
  if (p.impossible) return;
  switch (sweep.task) {
    case Task::greedy:
      add_mass(b, p);
      offer_best(b, b.key, b.highest_key, first, p);
      break;
    case Task::sample:
      add_mass(b, p);
      draw(*sweep.call, b, first, row, p);
      break;
    case Task::candidates:
      add_mass(b, p);
      offer_candidates(b, first, sweep.keep, memory);
      break;
    case Task::histogram:
      fill_histogram(b, first, row, memory);
      break;
    case Task::collect:
      collect_bucket(b, first, row, memory);
      break;
  }
}

template <class D>
void sweep_segment(Sweep& sweep, int64_t segment, std::vector<RowMemory>& memory) {
  const DecodeCall& call = *sweep.call;
  const auto* weight = static_cast<const typename D::Weight*>(call.weight);
  const int64_t end = std::min(call.vocab, (segment + 1) * kSegment), segments = sweep.segments();
  const auto groups = static_cast<int64_t>(sweep.packed.groups.size());
  Totals<D> totals;
  BlockLogits logits;
  for (int64_t first = segment * kSegment; first < end; first += kBlock) {
    const int64_t tokens = std::min(kBlock, end - first);
    WeightBlock<D> block{weight + first * call.weight_stride, call.weight_stride, call.width, tokens, true};
    const float* scales = call.scales == nullptr ? nullptr : call.scales + first;
    for (int64_t g = 0; g < groups; ++g) {
      const auto& group = sweep.packed.groups[static_cast<size_t>(g)];
      block.cold = g == 0;
      multiply<D>(group.size, block, reinterpret_cast<const typename D::Hidden*>(sweep.packed.data + group.offset),
                  totals);
      for (int k = 0; k < group.size; ++k) {
        const auto index = static_cast<size_t>(group.first + k);
        products<D>(totals[k], sweep.packed.scales[index], scales, tokens, logits.z);
        shape(call, first, tokens, logits);
        use_block(sweep, logits, first, sweep.rows[index],
                  sweep.partials[index * static_cast<size_t>(segments) + static_cast<size_t>(segment)], memory[index]);
      }
    }
  }
}

template <class D>
constexpr Product product() {
  return {pack_rows<D>, sweep_segment<D>};
}

}  // namespace
}  // namespace latentforge
