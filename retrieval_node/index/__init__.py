"""Index kinds over the keys of one layer of a shard. Importing this package registers all kinds."""

from retrieval_node.index import auto, flat, hnsw, ivf, kmeans, roargraph, sketch

__all__ = ["auto", "flat", "hnsw", "ivf", "kmeans", "roargraph", "sketch"]
