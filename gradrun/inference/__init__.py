"""One model over one data source, measured."""
