"""From text to batches: tokenizers, documents, chats, the Hugging Face Hub, prepared folders, the loader."""

