"""Corpus to tokens to packed shards; the fixed held-out split; the order of batches."""

from latentforge.data.build import build_shards
from latentforge.data.corpus import Corpus, Document
from latentforge.data.order import BatchOrder
from latentforge.data.shards import PackedShard, ShardSet

__all__ = ["BatchOrder", "Corpus", "Document", "PackedShard", "ShardSet", "build_shards"]
