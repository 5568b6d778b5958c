"""Commands that a user types. They may import both alphadecay and peft_pretraining."""
