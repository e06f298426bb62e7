r"""The typed tree of every setting \(schema\), its dotted keys \(keys\), and reading and writing it \(load\)."""
