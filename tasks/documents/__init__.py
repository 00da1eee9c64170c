"""Alone responsible for Parquet: input files become a manifest, shards, and a stream of documents.

Three rules shape it (design: parts.md, "Parquet reading"; ledger.md, G1 and G14). *Flat*: rows are read a few at a
time, without read-ahead, so memory depends neither on the file nor on its row groups. *Pinned*: a run is bound to the
bytes it was planned on; a file is hashed again before its first row is read, and page checksums, where written, are
verified on the way. *Contained*: a wrong input stops before any money moves, with every problem at once; a bad row
becomes an `UnfitDocument`, and no row can stop its shard.

A plan goes through `listing` (which files), `footers` (can they be read as the job says), `planning` (rows to shards)
and `duplicates`; a shard through `digests` (is it the same file), `pins`, `readers`, `filters` and `cells`. `exports`
writes: what an audit found.

Names of files are kept as the job spells them: relative to `root` where the path is, with the scheme for an object
store. Nothing outside this package knows what Arrow is.
"""

from tasks.documents.exports import write_table
from tasks.documents.planning import plan
from tasks.documents.reading import read_labels, read_shard

__all__ = ["plan", "read_labels", "read_shard", "write_table"]
