"""The shape of Llama 3 8B (Grattafiori et al. 2024, arXiv 2407.21783), on 160 billion tokens.

  python scripts/train.py --config=configs/llama_8b.py --config.data.text=corpus/ --workdir=runs/llama_8b

32 layers, 32 heads on 8 key-value heads, width 4,096, context 4,096. Expected loss: not known for your text.
Time: 1.9 days at 1 million tokens a second. Hardware: compiled, not run.
"""

from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config(tokenizer="sentencepiece")
    config.steps = 39_000
    config.global_batch_size = 1024
    config.data.text = ("corpus/",)
    config.data.sequence_length = 4096
    config.data.validation_fraction = 0.001
    config.tokenizer.vocab_size = 128_256
    config.tokenizer.sample_lines = 5_000_000
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.model_dim = 4096
    config.model.mlp_dim = 14_336
    config.model.rotary_base = 500_000.0
    config.model.tied_head = False
    config.model.remat = True
    config.optimizer.learning_rate = 3e-4
    config.schedule.warmup_steps = 2000
    config.mesh.recipe = "hsdp"  # cut among all chips, libtpu all-reduces whole gradients (docs/log.md)
    config.mesh.fsdp = 32
    config.evaluation.every = 500
    config.evaluation.batches = 10
    config.checkpoint.every = 500
    config.samples.prompt = "The "
    return config
