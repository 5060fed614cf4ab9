"""Generated from proto/apagent/v1 by scripts/proto: protocol buffers and gRPC stubs."""
