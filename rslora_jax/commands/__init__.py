"""Commands: what `rslora` can do, one function each; its docstring is its help."""
