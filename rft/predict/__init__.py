"""Uses a trained model: classes, features and relevance of new images."""
