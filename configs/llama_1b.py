"""The shape of Llama 3.2 1B (Grattafiori et al. 2024, arXiv 2407.21783), on 25 billion tokens.

  python scripts/train.py --config=configs/llama_1b.py --config.data.text=corpus/ --workdir=runs/llama_1b

16 layers, 32 heads on 8 key-value heads, width 2,048, context 2,048. Expected loss: not known for your text.
Time: 5.6 days at 52,000 tokens a second. Hardware: compiled, not run.
"""

from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config(tokenizer="sentencepiece")
    config.steps = 24_000
    config.global_batch_size = 512
    config.accumulation = 4
    config.data.text = ("corpus/",)
    config.data.sequence_length = 2048
    config.data.validation_fraction = 0.001
    config.tokenizer.vocab_size = 128_256
    config.tokenizer.sample_lines = 5_000_000
    config.model.num_layers = 16
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.model_dim = 2048
    config.model.mlp_dim = 8192
    config.model.rotary_base = 500_000.0
    config.model.remat = True
    config.optimizer.learning_rate = 6e-4
    config.schedule.warmup_steps = 1000
    config.mesh.recipe = "hsdp"
    config.evaluation.every = 500
    config.evaluation.batches = 20
    config.checkpoint.every = 500
    config.samples.prompt = "The "
    return config
