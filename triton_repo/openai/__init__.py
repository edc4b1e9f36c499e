"""OpenAI's completions and chat API in front of a Triton server.

A request goes app -> fields -> prompts -> upstream (gRPC) -> continuation -> answers. `launch` starts it all.
"""
