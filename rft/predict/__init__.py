"""Models as one uses them: classes, features and relevance of new images."""
