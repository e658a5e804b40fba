"""The page of `larp-mllm demo`: the models that it finds, what its tabs do, and the page itself.

Only `larp_mllm.demo.page` imports Gradio, which the extra `demo` installs.
"""
