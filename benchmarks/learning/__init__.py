"""Which models learn to use a long context, how soon, and what it gives: the tables of docs/model.md."""
