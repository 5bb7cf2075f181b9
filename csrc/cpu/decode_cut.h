// Where top-k and top-p end: the last allowed token in the order of rank(), exactly, whatever the row looks like.
//
// The largest candidates of the first sweep usually hold the end. Where they do not (a flat row, a large k), further
// sweeps count tokens and mass in histograms: first linear in the logit, then over the integers that floats are, then,
// among equal logits, over ids; until a bucket is small enough to be collected and sorted. Counts and masses are
// integers, so they do not depend on who adds them.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "decode.h"
#include "decode_math.h"

namespace latentforge {
namespace {

constexpr uint64_t kCollected = 2048;  // tokens of a bucket that is collected and sorted

// What a prefix of the tokens must reach: so many of them, or so much mass.
struct Goal {
  bool by_mass = false;
  double mass = 0.0;  // in mass_units()
  uint64_t count = 0;
  bool reached(uint64_t some_mass, uint64_t some_count) const {
    return by_mass ? static_cast<double>(some_mass) >= mass : some_count >= count;
  }
};

class Search {
 public:
  Search(const Goal& goal, float highest, float inverse_temperature)
      : goal_(goal), highest_(highest), inverse_(inverse_temperature) {}

  // Walks the ranked tokens (largest first) that follow those counted so far. True where the end is among them.
  bool walk(const std::vector<uint64_t>& ranked) {
    for (const uint64_t token : ranked) {
      mass_ += mass_units(from_order_key(rank_key(token)) * inverse_, highest_);
      ++count_;
      if (!goal_.reached(mass_, count_)) continue;
      cut_ = token;
      return true;
    }
    return false;
  }

  // The end lies beyond `ranked`: start again below the last logit of them, which others may share.
  void look_below(const std::vector<uint64_t>& ranked) {
    const int32_t last = rank_key(ranked.back());
    mass_ = count_ = 0;
    for (const uint64_t token : ranked) {
      if (rank_key(token) == last) break;
      mass_ += mass_units(from_order_key(rank_key(token)) * inverse_, highest_);
      ++count_;
    }
    buckets_.kind = Buckets::Kind::linear;
    buckets_.high = from_order_key(last);
    buckets_.per_logit = static_cast<float>(kBuckets - 1) / (goal_.by_mass ? 24.0f / inverse_ : 24.0f);
  }

  // Finds the bucket of the end. False where every token is allowed, and the search is over.
  bool narrow(const std::vector<Bucket>& histogram, int64_t vocab) {
    for (int i = 0; i < kBuckets; ++i) {
      const Bucket& bucket = histogram[static_cast<size_t>(i)];
      if (!goal_.reached(mass_ + bucket.mass, count_ + bucket.count)) {
        mass_ += bucket.mass;
        count_ += bucket.count;
        continue;
      }
      bucket_ = i;
      collecting_ = bucket.count <= kCollected;
      if (collecting_) return true;
      buckets_.highest_key = bucket.highest_key;
      buckets_.lowest_key = bucket.lowest_key;
      buckets_.kind = bucket.highest_key == bucket.lowest_key ? Buckets::Kind::ids : Buckets::Kind::keys;
      const int64_t span = buckets_.kind == Buckets::Kind::ids
                               ? vocab
                               : static_cast<int64_t>(bucket.highest_key) - bucket.lowest_key + 1;
      buckets_.shift = 0;
      while (((span - 1) >> buckets_.shift) >= kBuckets) ++buckets_.shift;
      return true;
    }
    return false;
  }

  bool collecting() const { return collecting_; }
  int bucket() const { return bucket_; }
  const Buckets& buckets() const { return buckets_; }
  uint64_t cut() const { return cut_; }    // 0 until found, and where every token is allowed
  uint64_t mass() const { return mass_; }  // of the allowed tokens, once the search is over

 private:
  Goal goal_;
  float highest_, inverse_;
  Buckets buckets_;
  int bucket_ = 0;
  bool collecting_ = false;
  uint64_t mass_ = 0, count_ = 0, cut_ = 0;
};

inline void sort_ranks(std::vector<uint64_t>& ranks) { std::sort(ranks.begin(), ranks.end(), std::greater<>()); }

}  // namespace
}  // namespace latentforge
