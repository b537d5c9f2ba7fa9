"""The gRPC face of the core: the only place that knows gRPC and the generated contract."""
