"""Our attention in the models of other packages: one module a package, imported on demand."""
