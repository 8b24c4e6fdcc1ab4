"""nanoGPT's CPU setting: a character model of Shakespeare on a laptop.

  python scripts/train.py --config=configs/shakespeare_char_cpu.py \\
      --config.data.text=tinyshakespeare.txt --workdir=runs/shakespeare

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps. Validation is the last tenth of the text,
all of it, in windows of 64 characters.
Expected validation loss: 1.896 to 1.905, three seeds on two CPU cores, 2 to 4 minutes.
"""

from llm_jax.training.experiment import default_config


def get_config(arg=""):
    config = default_config()
    config.steps = 2000
    config.global_batch_size = 12
    config.steps_per_dispatch = 10
    config.data.text = ("tinyshakespeare.txt",)
    config.data.validation = "position"
    config.data.validation_fraction = 0.1
    config.data.markers = False
    config.data.rows = "contiguous"
    config.data.sequence_length = 64
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.model_dim = 128
    config.model.positions = "learnt"
    config.model.norm = "layernorm"
    config.model.activation = "gelu"
    config.model.init_std = 0.02
    config.model.scan_layers = False
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta2 = 0.99
    config.schedule.warmup_steps = 100
    config.schedule.end_ratio = 0.1
    config.evaluation.every = 500
    config.evaluation.batch_size = 120
    config.checkpoint.every = 500
    config.samples.prompt = "\n"
    config.samples.tokens = 500
    config.samples.count = 1
    return config
