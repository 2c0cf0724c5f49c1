#include "graph_build.h"

#include <algorithm>
#include <numeric>

#include "beam.h"
#include "isa.h"
#include "occlusion.h"
#include "thread_pool.h"

namespace longreach {
namespace {

// Vertices handled by one task, and tasks between two calls of `proceed`, per thread.
constexpr int64_t kVerticesPerTask = 128;
constexpr int64_t kTasksPerTurn = 16;

// Lists of keys, one per vertex, in compressed rows.
struct Lists {
  std::vector<int64_t> offsets;
  std::vector<int32_t> items;

  const int32_t* begin(int64_t v) const { return items.data() + offsets[v]; }
  const int32_t* end(int64_t v) const { return items.data() + offsets[v + 1]; }
  int64_t size(int64_t v) const { return offsets[v + 1] - offsets[v]; }
};

using Adjacency = std::vector<std::vector<int32_t>>;

// lists[v] = every u with v in adjacency[u], ascending.
Lists reversed(const Adjacency& adjacency) {
  Lists lists;
  lists.offsets.assign(adjacency.size() + 1, 0);
  for (const auto& neighbours : adjacency)
    for (const int32_t v : neighbours) ++lists.offsets[v + 1];
  std::partial_sum(lists.offsets.begin(), lists.offsets.end(), lists.offsets.begin());
  lists.items.resize(lists.offsets.back());
  std::vector<int64_t> next(lists.offsets.begin(), lists.offsets.end() - 1);
  for (size_t u = 0; u < adjacency.size(); ++u)
    for (const int32_t v : adjacency[u]) lists.items[next[v]++] = static_cast<int32_t>(u);
  return lists;
}

class Builder {
 public:
  Builder(const Rows& keys, int64_t count, const GraphShape& shape, int threads,
          const std::function<bool()>& proceed)
      : kernels_(kernels()), keys_(keys), count_(count), shape_(shape), pool_(threads, false),
        proceed_(proceed) {}

  BuiltGraph build(const QueryNeighbours& neighbours) {
    project(neighbours);
    with_reverse_edges(projected_);
    entry_ = nearest_to_mean();
    connect();
    with_reverse_edges(links_);
    return joined();
  }

 private:
  // The keys are centred, so their mean is the origin and the nearest key the shortest one. Keys
  // that the projection gave no edges lead nowhere and are taken only when there are no others.
  int32_t nearest_to_mean() const {
    double shortest = 0;
    int32_t found = -1;
    const bool any = std::any_of(projected_.begin(), projected_.end(),
                                 [](const auto& own) { return !own.empty(); });
    for (int64_t v = 0; v < count_; ++v) {
      if (any && projected_[v].empty()) continue;
      const auto* row = keys_.row<Bfloat16>(v);
      double norm = 0;
      for (int c = 0; c < keys_.dim; ++c) norm += static_cast<double>(to_float(row[c])) * to_float(row[c]);
      if (found < 0 || norm < shortest) {
        shortest = norm;
        found = static_cast<int32_t>(v);
      }
    }
    return found;
  }

  // Runs body(v, occlusion) for every vertex, in parallel, asking between turns whether to go on.
  template <class Body>
  void for_each_vertex(Body body) {
    const int64_t turn = kVerticesPerTask * kTasksPerTurn * pool_.threads();
    for (int64_t first = 0; first < count_; first += turn) {
      if (!proceed_()) throw BuildStopped{};
      const int64_t stop = std::min(count_, first + turn);
      const int64_t tasks = (stop - first + kVerticesPerTask - 1) / kVerticesPerTask;
      pool_.run(static_cast<int>(tasks), [&](int task) {
        const int64_t begin = first + task * kVerticesPerTask;
        for (int64_t v = begin; v < std::min(stop, begin + kVerticesPerTask); ++v)
          body(static_cast<int32_t>(v));
      });
    }
  }

  // Each query's nearest keys are its pivots. The candidates of a pivot are the other neighbours of
  // all the queries whose pivot it is.
  void project(const QueryNeighbours& neighbours) {
    const Lists queries_of = queries_of_pivots(neighbours);
    projected_.assign(count_, {});
    for_each_vertex([&](int32_t v) {
      if (queries_of.size(v) == 0) return;
      thread_local std::vector<int32_t> candidates;
      thread_local Occlusion occlusion;
      candidates.clear();
      for (const int32_t* q = queries_of.begin(v); q != queries_of.end(v); ++q) {
        const int32_t* list = neighbours.ids + *q * neighbours.width;
        for (int64_t i = 0; i < neighbours.width && list[i] >= 0; ++i) candidates.push_back(list[i]);
      }
      occlusion.rank(kernels_, keys_, v, candidates);
      occlusion.choose(kernels_, keys_, shape_.degree, true, projected_[v]);
    });
  }

  Lists queries_of_pivots(const QueryNeighbours& neighbours) const {
    const int64_t pivots = std::min(shape_.pivots, neighbours.width);
    const auto for_each_pivot = [&](auto body) {
      for (int64_t q = 0; q < neighbours.queries; ++q)
        for (int64_t i = 0; i < pivots; ++i)
          if (const int32_t pivot = neighbours.ids[q * neighbours.width + i]; pivot >= 0)
            body(pivot, static_cast<int32_t>(q));
          else
            break;
    };
    Lists lists;
    lists.offsets.assign(count_ + 1, 0);
    for_each_pivot([&](int32_t pivot, int32_t) { ++lists.offsets[pivot + 1]; });
    std::partial_sum(lists.offsets.begin(), lists.offsets.end(), lists.offsets.begin());
    lists.items.resize(lists.offsets.back());
    std::vector<int64_t> next(lists.offsets.begin(), lists.offsets.end() - 1);
    for_each_pivot([&](int32_t pivot, int32_t query) { lists.items[next[pivot]++] = query; });
    return lists;
  }

  // Adds to every vertex the vertices that point at it, and prunes lists that grow too long.
  void with_reverse_edges(Adjacency& adjacency) {
    const Lists incoming = reversed(adjacency);
    for_each_vertex([&](int32_t v) {
      if (incoming.size(v) == 0) return;
      auto& own = adjacency[v];
      thread_local std::vector<int32_t> all;
      all.assign(own.begin(), own.end());
      all.insert(all.end(), incoming.begin(v), incoming.end(v));
      std::sort(all.begin(), all.end());
      all.erase(std::unique(all.begin(), all.end()), all.end());
      if (static_cast<int64_t>(all.size()) <= shape_.degree) {
        own = all;
        return;
      }
      thread_local Occlusion occlusion;
      occlusion.rank(kernels_, keys_, v, all);
      occlusion.choose(kernels_, keys_, shape_.degree, true, own);
    });
  }

  // Searches every key in the projected graph, and links it to the keys that the search expanded.
  void connect() {
    links_.assign(count_, {});
    for_each_vertex([&](int32_t v) {
      thread_local std::vector<int32_t> expanded;
      thread_local Occlusion occlusion;
      search(v, expanded);
      occlusion.rank(kernels_, keys_, v, expanded);
      occlusion.choose(kernels_, keys_, shape_.degree, true, links_[v]);
    });
  }

  void search(int32_t target, std::vector<int32_t>& expanded) const {
    thread_local RowTile tile;
    thread_local Beam beam;
    thread_local KeySet visited;
    thread_local std::vector<int32_t> fresh;
    thread_local std::vector<float> scores;
    const QueryTile& query = tile.pack(keys_, &target, 1);
    beam.clear(shape_.build_beam);
    visited.clear(count_);
    expanded.clear();
    fresh.assign(1, entry_);
    visited.add(entry_);
    while (true) {
      const int64_t found = static_cast<int64_t>(fresh.size());
      scores.resize(found * kTile);
      kernels_.score(keys_, {fresh.data(), 0, found}, query, scores.data());
      for (int64_t i = 0; i < found; ++i) beam.insert(scores[i * kTile], fresh[i], false);
      // Two keys at once: their neighbours' rows come from memory together.
      fresh.clear();
      int expansions = 0;
      for (int32_t key; expansions < 2 && (key = beam.pop()) >= 0; ++expansions) {
        expanded.push_back(key);
        for (const int32_t next : projected_[key])
          if (visited.add(next)) fresh.push_back(next);
      }
      if (expansions == 0) return;
    }
  }

  // Projected lists followed by the links, each neighbour once, every vertex reachable.
  BuiltGraph joined() {
    Adjacency& all = projected_;
    for_each_vertex([&](int32_t v) {
      auto& own = all[v];
      for (const int32_t key : links_[v])
        if (std::find(own.begin(), own.end(), key) == own.end()) own.push_back(key);
    });
    reach_all(all);
    BuiltGraph graph;
    graph.entry = entry_;
    graph.offsets.assign(count_ + 1, 0);
    for (int64_t v = 0; v < count_; ++v)
      graph.offsets[v + 1] = graph.offsets[v] + static_cast<int64_t>(all[v].size());
    graph.edges.reserve(graph.offsets.back());
    for (const auto& own : all) graph.edges.insert(graph.edges.end(), own.begin(), own.end());
    return graph;
  }

  // Pruned reverse edges can leave a key without a way in. Such a key gets an edge from that of its
  // own neighbours which can be reached and has the fewest edges: what many keys hang on is read
  // whole by every search that comes by. The entry gives an edge where nothing else can.
  void reach_all(Adjacency& all) const {
    KeySet reached;
    reached.clear(count_);
    std::vector<int32_t> open, left;
    const auto flood = [&](int32_t from) {
      open.assign(1, from);
      reached.add(from);
      while (!open.empty()) {
        const int32_t key = open.back();
        open.pop_back();
        for (const int32_t next : all[key])
          if (reached.add(next)) open.push_back(next);
      }
    };
    const auto way_in = [&](int32_t v) {
      int32_t from = -1;
      for (const int32_t key : all[v])
        if (reached.holds(key) && (from < 0 || all[key].size() < all[from].size())) from = key;
      return from;
    };
    if (count_ > 0) flood(entry_);
    for (int64_t v = 0; v < count_; ++v)
      if (!reached.holds(static_cast<int32_t>(v))) left.push_back(static_cast<int32_t>(v));
    while (!left.empty()) {
      size_t stuck = 0;
      for (const int32_t v : left) {
        if (reached.holds(v)) continue;
        const int32_t from = way_in(v);
        if (from < 0) {
          left[stuck++] = v;
          continue;
        }
        all[from].push_back(v);
        flood(v);
      }
      if (stuck == left.size()) {
        all[entry_].push_back(left[0]);
        flood(left[0]);
      }
      left.resize(stuck);
    }
  }

  const KernelTable& kernels_;
  Rows keys_;
  int64_t count_;
  GraphShape shape_;
  ThreadPool pool_;
  const std::function<bool()>& proceed_;
  int32_t entry_ = -1;
  Adjacency projected_, links_;
};

}  // namespace

BuiltGraph build_graph(const Rows& keys, int64_t count, const QueryNeighbours& neighbours,
                       const GraphShape& shape, int threads, const std::function<bool()>& proceed) {
  return Builder(keys, count, shape, threads, proceed).build(neighbours);
}

}  // namespace longreach
